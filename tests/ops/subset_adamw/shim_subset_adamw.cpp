// The GPU kernels on the CPU, against the rule written entry by entry in double.
#include "cuda/subset_adamw.cuh"

#include <string>

using namespace sk::subset_adamw;

#define CHECK(condition, ...)                                            \
    do {                                                                 \
        if (!(condition)) {                                              \
            std::fprintf(stderr, "line %d: %s: ", __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                           \
            std::exit(1);                                                \
        }                                                                \
    } while (0)

unsigned long random_state = 1;
double uniform() {  // in (-1, 1)
    random_state = random_state * 6364136223846793005ul + 1442695040888963407ul;
    return static_cast<double>(random_state >> 33) / (1ul << 30) - 1;
}

struct Entry {
    int64_t param, grad, state, row;
};

constexpr double kHyper[kHypers] = {0.1, 0.9, 0.95, 1e-3, 0.05};

// The learning rate of a step, and the clock after it.
double rate_at(int step) {
    return 0.25 - 0.05 * step;
}
std::vector<double> clock_at(int step) {
    std::vector<double> clock(kClock);
    for (int s = 1; s <= step; ++s) {
        const double hyper[] = {rate_at(s), kHyper[1], kHyper[2], kHyper[3], kHyper[4]};
        tick(clock.data(), hyper);
    }
    return clock;
}
int last_step(int64_t row) {
    return static_cast<int>(row % 3) + 1;
}

template <class P, class G>
struct Case {
    int64_t kind, rows, columns, block_rows = 2, block_columns = 4;
    bool master, sums, cohorts;
    int shift;  // entries by which storage is misaligned

    std::vector<int32_t> index;
    std::vector<uint8_t> bits, cohort;
    std::vector<int64_t> offsets;
    std::vector<P> param;
    std::vector<G> grad;
    std::vector<float> first, second, weight, sum_abs, sum_squared;
    std::vector<float> starts{0, 1, 2};
    std::vector<double> clock = clock_at(3), row_clock;
    std::vector<Entry> entries;
    float step = 3;
    int64_t state_size = 0;

    void pick(int64_t units) {
        for (int64_t u = 0; u < units; ++u)
            if (uniform() < 0.2) index.push_back(static_cast<int32_t>(u));
    }

    void lay_out() {
        const int64_t numel = rows * columns;
        int64_t grads = numel;
        if (kind == kAll) {
            for (int64_t e = 0; e < numel; ++e) entries.push_back({e, e, e, e / columns});
        } else if (kind == kRows || kind == kTouched) {
            pick(rows);
            for (size_t u = 0; u < index.size(); ++u)
                for (int64_t c = 0; c < columns; ++c) {
                    const int64_t p = index[u] * columns + c, s = u * columns + c;
                    entries.push_back({p, kind == kRows ? p : s, kind == kRows ? s : p, index[u]});
                }
            if (kind == kTouched) index.push_back(-1);
            if (kind == kTouched) grads = static_cast<int64_t>(index.size()) * columns;
        } else if (kind == kColumns) {
            pick(columns);
            for (int64_t r = 0; r < rows; ++r)
                for (int32_t c : index) {
                    const int64_t p = r * columns + c;
                    entries.push_back({p, p, static_cast<int64_t>(entries.size()), r});
                }
        } else if (kind == kBlocks) {
            const int64_t across = columns / block_columns;
            pick(rows / block_rows * across);
            for (int32_t b : index)
                for (int64_t i = 0; i < block_rows; ++i)
                    for (int64_t j = 0; j < block_columns; ++j) {
                        const int64_t row = b / across * block_rows + i;
                        const int64_t p = row * columns + b % across * block_columns + j;
                        entries.push_back({p, p, static_cast<int64_t>(entries.size()), row});
                    }
        } else {
            bits.assign((numel + 7) / 8, 0);
            for (int64_t e = 0; e < numel; ++e) {
                if (e % kSpan == 0) offsets.push_back(static_cast<int64_t>(entries.size()));
                const bool set = uniform() < 0.2;
                bits[e / 8] |= static_cast<uint8_t>(set << e % 8);
                const int64_t place = kind == kMasked ? e : static_cast<int64_t>(entries.size());
                if (set || kind == kMasked)
                    entries.push_back({e, set ? e : -1, place, e / columns});
            }
        }
        // Room for more: past the last unit there is none.
        const int64_t none = kind == kRows ? rows : rows / block_rows * (columns / block_columns);
        if (kind == kRows || kind == kBlocks) index.insert(index.end(), 5, int32_t(none));
        state_size = kind == kAll || kind == kTouched || kind == kMasked
                         ? numel
                         : static_cast<int64_t>(entries.size());
        for (int64_t e = 0; e < numel + shift; ++e) param.push_back(P(float(uniform())));
        for (int64_t e = 0; e < grads + shift; ++e) grad.push_back(G(float(uniform())));
        for (int64_t e = 0; e < state_size + shift; ++e) {
            first.push_back(float(uniform()));
            second.push_back(float(std::fabs(uniform())));
            weight.push_back(float(uniform()));
            cohort.push_back(static_cast<uint8_t>(e % 3));
        }
        sum_abs.assign(rows, 1.0f);
        sum_squared.assign(rows, 2.0f);
        for (int64_t r = 0; r < rows; ++r)
            for (double value : clock_at(last_step(r))) row_clock.push_back(value);
    }

    Item item() {
        const auto type = [](auto zero) -> int64_t {
            using T = decltype(zero);
            if (std::is_same<T, float>::value) return kFloat;
            return std::is_same<T, __half>::value ? kHalf : kBFloat16;
        };
        Item out{};
        out.param = param.data() + shift;
        out.grad = grad.data() + shift;
        out.exp_avg = first.data() + shift;
        out.exp_avg_sq = second.data() + shift;
        out.master = master ? weight.data() + shift : nullptr;
        out.step = &step;
        out.index = bits.empty() ? static_cast<void*>(index.data()) : bits.data();
        out.offsets = offsets.data();
        out.cohort = cohorts ? cohort.data() + shift : nullptr;
        out.cohort_start = starts.data();
        out.sum_abs = sums ? sum_abs.data() : nullptr;
        out.sum_squared = sums ? sum_squared.data() : nullptr;
        out.clock = clock.data();
        out.row_clock = row_clock.data();
        out.kind = kind;
        out.param_dtype = type(P{});
        out.grad_dtype = type(G{});
        out.rows = rows;
        out.columns = columns;
        out.units = static_cast<int64_t>(index.size());
        out.cohorts = 3;
        out.block_rows = block_rows;
        out.block_columns = block_columns;
        return out;
    }

    // As `_chunks` in native.py cuts the work, in smaller pieces.
    std::vector<Chunk> chunks() const {
        const bool summed = sums && columns > 1, flagged = kind == kElements || kind == kMasked;
        int64_t units = static_cast<int64_t>(index.size()), per = 3;
        if (kind == kAll && !summed) units = rows * columns, per = 500;
        if (flagged && !summed) units = (rows * columns + kSpan - 1) / kSpan, per = 1;
        if ((kind == kAll || flagged) && summed) units = rows;
        if (kind == kColumns) units = rows;
        if (kind == kBlocks && summed) units = rows / block_rows;
        std::vector<Chunk> out;
        for (int64_t u = 0; u < units; u += per) out.push_back({0, u, std::min(u + per, units)});
        return out;
    }
};

void near(double got, double want, double tolerance, const char* what, int64_t kind) {
    CHECK(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)), "kind %ld %s: %g, not %g\n",
          static_cast<long>(kind), what, got, want);
}

template <class P, class G>
void run(int64_t kind, int64_t rows, int64_t columns, bool master, bool sums, bool cohorts,
         int shift, float max_norm, bool infinite) {
    Case<P, G> one{};
    one.kind = kind;
    one.rows = rows;
    one.columns = columns;
    one.block_rows = rows % 2 == 0 ? 2 : 1;
    one.block_columns = columns % 4 == 0 ? 4 : 1;
    one.master = master;
    one.sums = sums;
    one.cohorts = cohorts && kind != kTouched && kind != kMasked;
    if (columns == 1) one.starts = {0, 0, 0};  // nobody joined late
    one.shift = shift;
    one.lay_out();
    const Case<P, G> before = one;
    const double* hyper = kHyper;
    const float scale = 4, bad = infinite ? 1.0f : 0.0f;
    const Item item = one.item();
    const std::vector<Chunk> chunks = one.chunks();
    std::vector<double> partials(chunks.size(), NAN);
    std::vector<Rates> rates(1);
    float norm = NAN;
    const Launch on{&item,
                    1,
                    chunks.data(),
                    static_cast<int64_t>(chunks.size()),
                    1ll << (3 * item.param_dtype + item.grad_dtype),
                    rates.data(),
                    2,
                    nullptr};
    launch_step(on, hyper, partials.data(), &norm, max_norm, &scale, &bad);

    double squares = 0;
    std::vector<bool> moved(before.param.size());
    for (const Entry& e : before.entries) {
        const double g = e.grad < 0 ? 0.0 : double(float(before.grad[e.grad + shift])) / scale;
        squares += g * g;
    }
    if (max_norm > 0) near(norm, std::sqrt(squares), 1e-6, "norm", kind);
    const double share = max_norm / (std::sqrt(squares) + 1e-6);
    const double clip = max_norm > 0 && share < 1 ? share : 1;
    std::vector<double> sum_abs(rows, 1), sum_squared(rows, 2);
    // A missed step's decay is taken as proportional to its learning rate.
    const double single = kind == kTouched ? 5e-6 : 1e-6;
    const double precision = std::is_same<P, float>::value ? single : 1e-2;
    for (const Entry& e : before.entries) {
        if (infinite) break;
        const double raw = e.grad < 0 ? 0.0 : double(float(before.grad[e.grad + shift])) / scale;
        double w = master ? before.weight[e.state + shift] : float(before.param[e.param + shift]);
        double m = before.first[e.state + shift], v = before.second[e.state + shift];
        sum_abs[e.row] += std::fabs(w * raw);
        sum_squared[e.row] += raw * raw;
        const double g = raw * clip;
        double age = 4;
        if (one.cohorts) age -= before.starts[(e.state + shift) % 3];
        if (kind == kTouched) {
            double moving = m / (std::sqrt(v) + hyper[kEps]);
            for (int t = last_step(e.row) + 1; t <= 3; ++t) {
                m *= hyper[kBeta1];
                v *= hyper[kBeta2];
                moving *= hyper[kBeta1] / std::sqrt(hyper[kBeta2]);
                w *= 1 - rate_at(t) * hyper[kWeightDecay];
                w -= rate_at(t) * std::sqrt(1 - std::pow(hyper[kBeta2], t)) /
                     (1 - std::pow(hyper[kBeta1], t)) * moving;
            }
        }
        m += (g - m) * (1 - hyper[kBeta1]);
        v = hyper[kBeta2] * v + (1 - hyper[kBeta2]) * g * g;
        const double root = std::sqrt(v / (1 - std::pow(hyper[kBeta2], age))) + hyper[kEps];
        w = w * (1 - hyper[kLr] * hyper[kWeightDecay]) -
            hyper[kLr] / (1 - std::pow(hyper[kBeta1], age)) * m / root;
        near(one.first[e.state + shift], m, 1e-6, "exp_avg", kind);
        near(one.second[e.state + shift], v, 1e-6, "exp_avg_sq", kind);
        near(float(one.param[e.param + shift]), w, precision, "param", kind);
        if (master) near(one.weight[e.state + shift], w, single, "master", kind);
        moved[e.param + shift] = true;
    }
    for (size_t p = 0; p < moved.size(); ++p)
        CHECK(moved[p] || float(one.param[p]) == float(before.param[p]),
              "kind %ld frozen entry %zu\n", static_cast<long>(kind), p);
    CHECK(one.step == (infinite ? 3 : 4), "step %g\n", one.step);
    for (int64_t r = 0; r < rows && sums; ++r) {
        near(one.sum_abs[r], sum_abs[r], 1e-5, "sum_abs", kind);
        near(one.sum_squared[r], sum_squared[r], 1e-5, "sum_squared", kind);
    }
    if (kind == kTouched && !infinite) {
        const double log1 = std::log(0.9), log2 = std::log(0.95);
        const double then[] = {before.clock[0] + std::log(0.995), before.clock[1] + log1,
                               before.clock[2] + log2, before.clock[3] + 0.1, 0.1};
        for (int k = 0; k < kClock; ++k) {
            near(one.clock[k], then[k], 1e-12, "clock", kind);
            for (int32_t row : one.index)
                if (row >= 0) CHECK(one.row_clock[row * kClock + k] == one.clock[k], "row clock\n");
        }
    }
    if (infinite) CHECK(one.first == before.first && one.clock == before.clock, "skipped\n");
}

// Every `stride`-th variant; 0 and 3 differ in whatever a dtype could matter to.
template <class P, class G>
void run_all(bool master, int stride) {
    const int64_t shapes[][2] = {{6, 40}, {300, 1}, {34, 133}};
    for (const auto& shape : shapes)
        for (int64_t kind = kAll; kind <= kTouched; ++kind)
            for (int variant = 0; variant < 6; variant += stride)
                run<P, G>(kind, shape[0], shape[1], master, variant % 2, variant / 2 == 1,
                          variant / 2, variant == 4 ? 0.0f : 0.7f, variant == 5);
}

template <class G>
void coalesce(int64_t wide, int shift) {
    const std::vector<int64_t> order{5, 0, 2, 1, 3, 4};
    std::vector<int64_t> rows{1, 1, 1, 4, 6, 6}, from = order;
    for (int64_t i = 0; i < 70; ++i) rows.push_back(9), from.push_back(75 - i);
    const int64_t n = 76;
    std::vector<G> values;
    for (int64_t i = 0; i < n * wide + shift; ++i) values.push_back(G(float(uniform())));
    std::vector<int32_t> touched(n, 77);
    std::vector<float> sums(n * wide, NAN);
    Item item{};
    SK_LAUNCH(coalesce_rows<G>, 3, kThreads, 0, nullptr, rows.data(), from.data(),
              values.data() + shift, n, wide, touched.data(), sums.data(), &item);
    CHECK(item.grad == sums.data() && item.index == touched.data(), "addresses\n");
    for (int64_t i = 0; i < n; ++i) {
        const bool first = i == 0 || rows[i] != rows[i - 1];
        CHECK(touched[i] == (first ? rows[i] : -1), "touched %d\n", touched[i]);
        for (int64_t c = 0; c < wide && first; ++c) {
            float want = 0;
            for (int64_t j = 0; j < n; ++j)
                if (rows[j] == rows[i]) want += float(values[from[j] * wide + c + shift]);
            CHECK(sums[i * wide + c] == want, "sum\n");
        }
    }
}

int main() {
    sk_shim::for_each_order([] {
        run_all<float, float>(false, sk_shim::order == sk_shim::Order::ascending ? 1 : 3);
        coalesce<float>(45, 0);
        coalesce<float>(300, 0);
        coalesce<float>(300, 1);
    });
    run_all<__nv_bfloat16, __nv_bfloat16>(true, 3);
    run_all<__nv_bfloat16, float>(false, 3);
    run_all<__half, __half>(true, 3);
    run_all<__half, float>(true, 3);
    coalesce<__nv_bfloat16>(260, 0);
    coalesce<__half>(131, 1);
    coalesce<float>(1, 0);
    std::puts("ok");
}
