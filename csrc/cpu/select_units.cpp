// Units under a count or a cost budget; select_kept/reference.py is the definition.
#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

using sk::ScalarType;
using sk::Tensor;

enum Mode : int64_t { kPerSegment, kEqual, kBudget };

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Ascending keys from the highest score to the lowest, NaN last; -0 = +0.
uint64_t falling_key(double score) {
    if (score != score) return ~0ull;
    score += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &score, 8);
    return bits >> 63 ? bits : ~bits & ~(1ull << 63);
}

// Memory of one thread, kept from call to call: new pages cost more than the work in them.
struct Scratch {
    std::vector<uint64_t> keys, words, moved;
    std::vector<int32_t> other;
};

// Ascending by the `width` bits above `shift`, equal ones in their order.
void sort_words(Scratch& s, int shift, int width) {
    constexpr int kDigit = 11, kMost = 6;
    const int passes = (width + kDigit - 1) / kDigit;
    const int digit = passes ? (width + passes - 1) / passes : 0;
    const uint64_t mask = (1ull << digit) - 1;
    int32_t place[kMost][1 << kDigit] = {};
    for (const uint64_t word : s.words)
        for (int p = 0; p < passes; ++p) ++place[p][word >> (shift + p * digit) & mask];
    s.moved.resize(s.words.size());
    for (int p = 0; p < passes; ++p) {
        int32_t before = 0;
        for (uint64_t d = 0; d <= mask; ++d) std::swap(place[p][d], before), before += place[p][d];
        for (const uint64_t word : s.words)
            s.moved[place[p][word >> (shift + p * digit) & mask]++] = word;
        s.words.swap(s.moved);
    }
}

int width_of(uint64_t value) {
    return value ? 64 - __builtin_clzll(value) : 0;
}

// Positions by ascending key, ties by position. A key's bits and its position share a word, so
// that one array is sorted; float32 scores need one round.
void sort_positions(Scratch& s, std::vector<int32_t>& order) {
    const int64_t n = (int64_t)s.keys.size();
    order.resize(n);
    for (int64_t i = 0; i < n; ++i) order[i] = (int32_t)i;
    if (n < 2) return;
    uint64_t lowest = ~0ull, highest = 0, differs = 0;
    for (const uint64_t key : s.keys) {
        lowest = std::min(lowest, key);
        highest = std::max(highest, key);
        differs |= key ^ s.keys[0];
    }
    if (!differs) return;
    const int zeros = __builtin_ctzll(differs), width = width_of((highest - lowest) >> zeros);
    const int at = width_of((uint64_t)n - 1), room = 64 - at;
    s.words.resize(n);
    for (int done = 0; done < width; done += room) {
        for (int64_t i = 0; i < n; ++i)
            s.words[i] = (s.keys[order[i]] - lowest) >> zeros >> done << at | (uint64_t)order[i];
        sort_words(s, at, std::min(room, width - done));
        for (int64_t i = 0; i < n; ++i) order[i] = (int32_t)(s.words[i] & ((1ull << at) - 1));
    }
}

// Bundles of consecutively ranked units, segment after segment.
struct Chunks {
    std::vector<double> score, cost;
    std::vector<int32_t> infinite, first, units, segment;
    std::vector<uint8_t> kind, forced;
    bool finite = true;  // every score

    int64_t size() const { return (int64_t)score.size(); }
};

struct Problem {
    const double *scores, *costs;  // costs: null if every unit costs 1
    const int64_t *kinds, *segments;
    int64_t n, n_segments;
    int64_t minimum[2], multiple[2];
    std::vector<int32_t> listed;  // units, segment after segment, best first
    std::vector<int32_t> place;   // in `listed`, of all units from the best to the worst
    std::vector<int32_t> start;   // of each segment, and the end
    std::vector<int32_t> order;   // free chunks, best first
    std::vector<uint8_t> kept;    // of chunks
    std::vector<int32_t> of_kind[2];
    std::vector<double> sums[2];
    std::vector<int64_t> infinite[2];
    Chunks chunks;
    Scratch scratch;

    int64_t kind_of(int64_t segment) const {
        return kinds && start[segment] < start[segment + 1] ? kinds[start[segment]] : 0;
    }
    void rank();
    void bundle();
    void order_by(const std::vector<double>& value);
    void order_by_score();
    void fill_equal(double left);
    void fill_two_kinds(double left);
    void fill_greedy(double left, bool prefix);
};

void Problem::rank() {
    scratch.keys.resize(n);
    for (int64_t i = 0; i < n; ++i) scratch.keys[i] = falling_key(scores[i]);
    sort_positions(scratch, listed);
    start.assign(n_segments + 1, 0);
    place.resize(n);
    if (!segments) {
        start[n_segments] = (int32_t)n;
        for (int64_t i = 0; i < n; ++i) place[i] = (int32_t)i;
        return;
    }
    for (int64_t i = 0; i < n; ++i) ++start[segments[i] + 1];
    for (int64_t s = 0; s < n_segments; ++s) start[s + 1] += start[s];
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    std::vector<int32_t>& by_segment = scratch.other;
    by_segment.resize(n);
    for (int64_t i = 0; i < n; ++i) by_segment[place[i] = next[segments[listed[i]]]++] = listed[i];
    listed.swap(by_segment);
}

void Problem::bundle() {
    Chunks& c = chunks;
    int64_t count = 0;
    for (int64_t s = 0; s < n_segments; ++s) {
        const int64_t step = multiple[kind_of(s)];
        count += (start[s + 1] - start[s] + step - 1) / step;
    }
    for (auto* column : {&c.score, &c.cost}) column->resize(count);
    for (auto* column : {&c.infinite, &c.first, &c.units, &c.segment}) column->resize(count);
    for (auto* column : {&c.kind, &c.forced}) column->resize(count);
    c.finite = true;
    int64_t at = 0;
    for (int64_t s = 0; s < n_segments; ++s) {
        const int64_t kind = kind_of(s), step = multiple[kind];
        for (int64_t rank = 0; rank < start[s + 1] - start[s]; rank += step, ++at) {
            const int64_t first = start[s] + rank;
            const int64_t end = std::min<int64_t>(first + step, start[s + 1]);
            double score = 0, cost = 0;
            int32_t infinite = 0;
            for (int64_t i = first; i < end; ++i) {
                const double x = scores[listed[i]];
                cost += costs ? costs[listed[i]] : 1.0;
                if (std::isfinite(x)) {
                    score += x;
                } else {
                    infinite += x == kInfinity ? 1 : -1;
                    c.finite = false;
                }
            }
            c.score[at] = score;
            c.cost[at] = cost;
            c.infinite[at] = infinite;
            c.first[at] = (int32_t)first;
            c.units[at] = (int32_t)(end - first);
            c.segment[at] = (int32_t)s;
            c.kind[at] = (uint8_t)kind;
            c.forced[at] = rank < minimum[kind];
        }
    }
}

// Free chunks by infinite part, then `value`, then position.
void Problem::order_by(const std::vector<double>& value) {
    const Chunks& c = chunks;
    scratch.keys.resize(c.size());
    for (int64_t i = 0; i < c.size(); ++i) scratch.keys[i] = falling_key(value[i]);
    sort_positions(scratch, order);
    const auto forced = [&](int32_t i) { return c.forced[i] != 0; };
    order.erase(std::remove_if(order.begin(), order.end(), forced), order.end());
    if (!c.finite)
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return c.infinite[a] > c.infinite[b]; });
}

void Problem::order_by_score() {
    // A chunk for each unit: the units are in order already.
    if (chunks.size() != n || !chunks.finite) return order_by(chunks.score);
    order.clear();
    for (const int32_t i : place)
        if (!chunks.forced[i]) order.push_back(i);
}

void Problem::fill_equal(double left) {
    order_by_score();
    const auto& cost = chunks.cost;
    const double price = cost.empty() ? 0 : *std::max_element(cost.begin(), cost.end());
    const double affordable = price > 0 ? std::floor(left / price) : kInfinity;
    for (size_t i = 0; i < order.size() && (double)(i + 1) <= affordable; ++i) kept[order[i]] = 1;
}

bool one_cost_per_kind(const Chunks& c) {
    double price[2] = {-1, -1};
    for (int64_t i = 0; i < c.size(); ++i) {
        double& mine = price[c.kind[i]];
        if (mine >= 0 && mine != c.cost[i]) return false;
        mine = c.cost[i];
    }
    return price[0] >= 0 && price[1] >= 0;
}

// For every number of chunks of kind 0 the rest is filled with kind 1 (arXiv 2204.09656).
void Problem::fill_two_kinds(double left) {
    const Chunks& c = chunks;
    order_by_score();
    for (auto& list : of_kind) list.clear();
    for (const int32_t i : order) of_kind[c.kind[i]].push_back(i);
    double price[2] = {0, 0};
    for (int64_t i = 0; i < c.size(); ++i) price[c.kind[i]] = std::max(price[c.kind[i]], c.cost[i]);
    for (const int kind : {0, 1}) {
        sums[kind].assign(1, 0.0);
        infinite[kind].assign(1, 0);
        for (const int32_t i : of_kind[kind]) {
            sums[kind].push_back(sums[kind].back() + c.score[i]);
            infinite[kind].push_back(infinite[kind].back() + c.infinite[i]);
        }
    }
    const int64_t most1 = (int64_t)of_kind[1].size();
    int64_t best[2] = {0, 0}, best_count = std::numeric_limits<int64_t>::min();
    double best_score = -kInfinity;
    for (int64_t n0 = 0; n0 <= (int64_t)of_kind[0].size(); ++n0) {
        const double spent = (double)n0 * price[0];
        if (spent > left) break;
        const double fits = price[1] > 0 ? std::floor((left - spent) / price[1]) : kInfinity;
        int64_t n1 = (int64_t)std::min(std::max(fits, 0.0), (double)most1);
        if (n1 > 0 && spent + (double)n1 * price[1] > left) --n1;
        const double score = sums[0][n0] + sums[1][n1];
        const int64_t count = infinite[0][n0] + infinite[1][n1];
        if (count < best_count || (count == best_count && !(score > best_score))) continue;
        best_count = count;
        best_score = score;
        best[0] = n0;
        best[1] = n1;
    }
    for (const int kind : {0, 1})
        for (int64_t i = 0; i < best[kind]; ++i) kept[of_kind[kind][i]] = 1;
}

// Best score per cost first; what does not fit is skipped, and with `prefix` ends its segment.
void Problem::fill_greedy(double left, bool prefix) {
    const Chunks& c = chunks;
    std::vector<double> value(c.size());
    for (int64_t i = 0; i < c.size(); ++i) {
        value[i] = c.cost[i] > 0 ? c.score[i] / c.cost[i] : kInfinity;
        if (prefix && i && c.segment[i] == c.segment[i - 1])
            value[i] = std::min(value[i], value[i - 1]);
    }
    std::vector<uint8_t> ended(n_segments, 0);
    double spent = 0;  // since `left` was last brought up to date
    bool first = true;
    order_by(value);
    for (const int32_t i : order) {
        if (prefix && ended[c.segment[i]]) continue;
        if (first || c.cost[i] <= left) {
            if (spent + c.cost[i] > left) {
                left -= spent;
                spent = 0;
                first = false;
            }
            if (first || c.cost[i] <= left) {
                spent += c.cost[i];
                kept[i] = 1;
                continue;
            }
        }
        ended[c.segment[i]] = 1;
    }
}

void write(const Problem& p, bool* bits, int32_t* indices, int32_t* counts) {
    int64_t found = 0;
    for (int64_t s = 0; s < p.n_segments; ++s) counts[s] = 0;
    for (int64_t i = 0; i < p.n; ++i) {  // no branch: half may be kept
        indices[found] = (int32_t)i;
        found += bits[i];
        counts[p.segments ? p.segments[i] : 0] += bits[i];
    }
    std::fill(indices + found, indices + p.n, (int32_t)p.n);
}

template <class T>
const T* data_of(const std::optional<Tensor>& t, const char* name, ScalarType dtype, int64_t n) {
    if (!t) return nullptr;
    sk::check_cpu(*t, name);
    sk::check_dtype(*t, name, dtype);
    sk::check_contiguous(*t, name);
    sk::check_numel(*t, name, n);
    return static_cast<const T*>(t->const_data_ptr());
}

// Returns the cost of the minimum. `limits`: a count for each segment, or one budget.
double select_units(const Tensor& scores, std::optional<Tensor> costs,
                    std::optional<Tensor> segments, std::optional<Tensor> kinds,
                    const Tensor& limits, int64_t mode, std::vector<int64_t> minimum,
                    std::vector<int64_t> multiple, bool prefix, Tensor bits, Tensor indices,
                    Tensor counts) {
    static thread_local Problem of_this_thread;
    Problem& p = of_this_thread;
    p.n = scores.numel();
    p.n_segments = counts.numel();
    STD_TORCH_CHECK(p.n < INT32_MAX, "scores: expected fewer than 2**31 units, got ", p.n);
    STD_TORCH_CHECK(minimum.size() == 2 && multiple.size() == 2,
                    "multiple: expected one entry for each of two kinds");
    p.scores = data_of<double>(scores, "scores", ScalarType::Double, p.n);
    p.costs = data_of<double>(costs, "costs", ScalarType::Double, p.n);
    p.segments = data_of<int64_t>(segments, "segments", ScalarType::Long, p.n);
    p.kinds = data_of<int64_t>(kinds, "kinds", ScalarType::Long, p.n);
    sk::check_count(mode, "mode", kPerSegment, kBudget);
    sk::check_count(p.n_segments, "n_segments", !p.segments && p.n ? 1 : 0, INT32_MAX);
    if (p.segments) {
        sk::check_index(p.segments, p.n, "segments", 0, p.n_segments);
        for (int64_t i = 1; i < p.n; ++i)
            STD_TORCH_CHECK(p.segments[i] >= p.segments[i - 1], "segments: expected ids that rise");
    }
    if (p.kinds) sk::check_index(p.kinds, p.n, "kinds", 0, 2);
    for (const int kind : {0, 1}) {
        sk::check_count(minimum[kind], "minimum", 0, INT64_MAX);
        sk::check_count(multiple[kind], "multiple", 1, INT32_MAX);
        p.minimum[kind] = minimum[kind];
        p.multiple[kind] = multiple[kind];
    }
    const int64_t n_limits = mode == kPerSegment ? p.n_segments : 1;
    const double* limit = data_of<double>(limits, "limits", ScalarType::Double, n_limits);
    for (int64_t i = 0; i < n_limits; ++i)
        STD_TORCH_CHECK(limit[i] == limit[i] && (limit[i] < 0x1p62 || mode != kPerSegment),
                        "limits: expected counts or a budget, got ", limit[i]);
    data_of<bool>(bits, "bits", ScalarType::Bool, p.n);
    data_of<int32_t>(indices, "indices", ScalarType::Int, p.n);
    data_of<int32_t>(counts, "counts", ScalarType::Int, p.n_segments);
    bool* flags = static_cast<bool*>(bits.mutable_data_ptr());
    p.rank();

    double least = 0;
    if (mode == kPerSegment) {
        for (int64_t s = 0; s < p.n_segments; ++s) {
            const int64_t size = p.start[s + 1] - p.start[s], kind = p.kind_of(s);
            const int64_t step = p.multiple[kind];
            const int64_t wanted = std::clamp<int64_t>((int64_t)limit[s], 0, size);
            const int64_t rounded = wanted == size ? wanted : wanted / step * step;
            for (int64_t rank = 0; rank < size; ++rank)
                flags[p.listed[p.start[s] + rank]] =
                    rank / step * step < p.minimum[kind] || rank < rounded;
        }
    } else {
        p.bundle();
        const Chunks& c = p.chunks;
        p.kept = c.forced;
        for (int64_t i = 0; i < c.size(); ++i)
            if (c.forced[i]) least += c.cost[i];
        const double left = *limit - least;
        if (left < 0) return least;
        if (mode == kEqual)
            p.fill_equal(left);
        else if (one_cost_per_kind(c))
            p.fill_two_kinds(left);
        else
            p.fill_greedy(left, prefix);
        for (int64_t i = 0; i < c.size(); ++i)
            for (int32_t j = 0; j < c.units[i]; ++j) flags[p.listed[c.first[i] + j]] = p.kept[i];
    }
    write(p, flags, static_cast<int32_t*>(indices.mutable_data_ptr()),
          static_cast<int32_t*>(counts.mutable_data_ptr()));
    return least;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "select_units(Tensor scores, Tensor? costs, Tensor? segments, Tensor? kinds, "
        "Tensor limits, int mode, int[] minimum, int[] multiple, bool prefix, Tensor(a!) bits, "
        "Tensor(b!) indices, Tensor(c!) counts) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("select_units", TORCH_BOX(&select_units));
}
