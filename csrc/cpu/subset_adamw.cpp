// AdamW over kept entries: one pass over weight, gradient and compact state, all tensors in a call.
#include "subset_adamw.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/ranges.h"
#include "cpu/subset_adamw_bits.h"
#include "cpu/subset_adamw_simd.h"
#include "cpu/subset_adamw_visit.h"
#include "subset_adamw_checks.h"

namespace sk::subset_adamw {
namespace {

// A step's numbers for one parameter.
struct Rates {
    float scale, unscale;  // of the gradient: for the update, and for the sums
    float decay, one_minus_beta1, beta2, one_minus_beta2, eps;
    float step_size, inverse_root;      // by bias correction
    std::vector<float> cohort_factors;  // 256 step sizes, then 256 inverse roots
    const double* hyper;
    double clock[kClock];  // after this step
};

int64_t width(int64_t dtype) {
    return dtype == kFloat ? 4 : 2;
}

void widen(const void* from, int64_t dtype, float* to, int64_t n) {
    if (dtype == kBFloat16) {
        widen_bfloat16(static_cast<const uint16_t*>(from), to, n);
    } else {
        widen_half(static_cast<const _Float16*>(from), to, n);
    }
}

void narrow(const float* from, int64_t dtype, void* to, int64_t n) {
    if (dtype == kBFloat16) {
        narrow_bfloat16(from, static_cast<uint16_t*>(to), n);
    } else {
        narrow_half(from, static_cast<_Float16*>(to), n);
    }
}

const char* at(const void* base, int64_t dtype, int64_t entry) {
    return static_cast<const char*>(base) + entry * width(dtype);
}
char* at(void* base, int64_t dtype, int64_t entry) {
    return static_cast<char*>(base) + entry * width(dtype);
}

void fetch_run(const void* base, int64_t dtype, int64_t entry, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / width(dtype)) fetch_far(at(base, dtype, entry + i));
}

template <class T>
void take(const T* from, const Pick& pick, T* to, int64_t n) {
    if (pick.bits) return compress(from, pick.bits, pick.span, 4 * n < pick.span, to);
    if (pick.width) {
        for (int64_t i = 0; i < n; i += pick.width, from += pick.stride) {
            for (int64_t line = 0; line < pick.width; line += 64 / (int64_t)sizeof(T))
                fetch_far(from + pick.ahead + line);
            std::memcpy(to + i, from, pick.width * sizeof(T));
        }
        return;
    }
    take_named(from, pick.index, pick.ahead, to, n);
}

template <class T>
void put(const T* from, const Pick& pick, T* to, int64_t n) {
    if (pick.bits) return expand(from, n, pick.bits, pick.span, to);
    if (pick.width) {
        for (int64_t i = 0; i < n; i += pick.width, to += pick.stride)
            std::memcpy(to, from + i, pick.width * sizeof(T));
        return;
    }
    for (int64_t i = 0; i < n; ++i) to[pick.index[i]] = from[i];
}

// Entries of a piece as float: in place, or staged in `buffer`.
const float* load(const void* base, int64_t dtype, int64_t origin, const Pick& pick, int64_t n,
                  float* buffer) {
    const char* from = at(base, dtype, origin);
    if (dtype == kFloat) {
        if (!pick) return reinterpret_cast<const float*>(from);
        take(reinterpret_cast<const uint32_t*>(from), pick, reinterpret_cast<uint32_t*>(buffer), n);
        return buffer;
    }
    alignas(64) uint16_t narrow16[kStaged];
    if (pick) take(reinterpret_cast<const uint16_t*>(from), pick, narrow16, n);
    widen(pick ? reinterpret_cast<const char*>(narrow16) : from, dtype, buffer, n);
    return buffer;
}

const float* load_grad(const Item& item, int64_t origin, const Pick& pick, int64_t n,
                       float* buffer) {
    const float* grad = load(item.grad, item.grad_dtype, origin, pick, n, buffer);
    if (item.kind != kMasked) return grad;
    mask_entries(static_cast<const uint8_t*>(item.index), origin, grad, buffer, n);
    return buffer;
}

float* load_weight(const Item& item, int64_t origin, int64_t state, const Pick& pick, int64_t n,
                   float* buffer) {
    if (item.master) return item.master + state;
    if (item.param_dtype == kFloat && !pick) return static_cast<float*>(item.param) + origin;
    load(item.param, item.param_dtype, origin, pick, n, buffer);
    return buffer;
}

void store_weight(const Item& item, int64_t origin, const Pick& pick, int64_t n,
                  const float* weight) {
    char* to = at(item.param, item.param_dtype, origin);
    if (item.param_dtype == kFloat) {
        if (pick)
            put(reinterpret_cast<const uint32_t*>(weight), pick, reinterpret_cast<uint32_t*>(to),
                n);
        return;
    }
    if (!pick) return narrow(weight, item.param_dtype, to, n);
    alignas(64) uint16_t narrow16[kStaged];
    narrow(weight, item.param_dtype, narrow16, n);
    put(narrow16, pick, reinterpret_cast<uint16_t*>(to), n);
}

double squares(const Item& item, const Chunk& chunk) {
    double total = 0;
    alignas(64) float buffer[kStaged];
    visit(
        item, chunk.first, chunk.end,
        [&](int64_t, int64_t grad, int64_t, const Pick& pick, int64_t n) {
            total += sum_of_squares(load_grad(item, grad, pick, n, buffer), n);
        },
        [](int64_t) {});
    return total;
}

void update(const Item& item, const Rates& rates, const Chunk& chunk) {
    alignas(64) float weights[kStaged], grads[kStaged], lanes[32] = {};
    const float* factors = rates.cohort_factors.data();
    const bool entrywise = item.columns == 1 && item.kind != kTouched;
    const auto piece = [&](int64_t param, int64_t grad, int64_t state, const Pick& pick,
                           int64_t n) {
        float* w = load_weight(item, param, state, pick, n, weights);
        const float* g = load_grad(item, grad, pick, n, grads);
        float *m = item.exp_avg + state, *v = item.exp_avg_sq + state;
        const bool by_lanes = item.sums() && !entrywise;
        const bool fused = by_lanes && item.kind != kTouched && !item.cohort;
        if (by_lanes && !fused) sum_lanes(w, g, n, lanes);
        if (item.sums() && entrywise)
            sum_entries(w, g, pick.index, n, item.sum_abs ? item.sum_abs + param : nullptr,
                        item.sum_squared ? item.sum_squared + param : nullptr, rates.unscale);
        if (item.kind == kTouched) {
            const double* row = item.row_clock + param / item.columns * kClock;
            const auto missed = [&](int k) {
                return static_cast<float>(std::exp(item.clock[k] - row[k]));
            };
            const double moves = missed_moves(item.clock, row, rates.hyper, *item.step, 1, 1);
            make_up(w, m, v, n, missed(0), missed(1), missed(2), static_cast<float>(moves),
                    rates.eps);
        }
        const Factors f{rates.scale,           rates.decay,     rates.one_minus_beta1, rates.beta2,
                        rates.one_minus_beta2, rates.step_size, rates.inverse_root,    rates.eps};
        // Fetching the line that is read next instead keeps the hardware from fetching ahead.
        const bool jumps = item.kind == kRows;
        const Ahead ahead{item.master    ? n
                          : w == weights ? 0
                                         : pick.ahead,
                          g == grads ? 0 : pick.ahead, pick.width ? n : 0, jumps};
        if (jumps && pick.ahead) {
            if (w == weights || item.master)
                fetch_run(item.param, item.param_dtype, param + pick.ahead, n);
            if (g == grads) fetch_run(item.grad, item.grad_dtype, grad + pick.ahead, n);
        }
        if (item.cohort) {
            adamw_cohorts(w, g, m, v, item.cohort + state, n, f, factors);
        } else if (fused) {
            adamw_sums(w, g, m, v, n, f, ahead, lanes);
        } else {
            adamw(w, g, m, v, n, f, ahead);
        }
        store_weight(item, param, pick, n, w);
    };
    const auto row_done = [&](int64_t row) {
        if (item.kind == kTouched) std::copy_n(rates.clock, kClock, item.row_clock + row * kClock);
        if (!item.sums() || entrywise) return;
        float sums[2];
        fold_lanes(lanes, sums);
        if (item.sum_abs) item.sum_abs[row] += sums[0] * rates.unscale;
        if (item.sum_squared) item.sum_squared[row] += sums[1] * (rates.unscale * rates.unscale);
    };
    visit(item, chunk.first, chunk.end, piece, row_done);
}

Rates make_rates(const Item& item, const double* hyper, double clip, double unscale) {
    const double lr = hyper[kLr], beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
    const double decay = 1 - lr * hyper[kWeightDecay];
    const auto step_size = [&](double age) { return lr / (1 - std::pow(beta1, age)); };
    const auto inverse_root = [&](double age) { return 1 / std::sqrt(1 - std::pow(beta2, age)); };
    const double age = static_cast<double>(*item.step) + 1;
    Rates rates{static_cast<float>(clip * unscale),
                static_cast<float>(unscale),
                static_cast<float>(decay),
                static_cast<float>(1 - beta1),
                static_cast<float>(beta2),
                static_cast<float>(1 - beta2),
                static_cast<float>(hyper[kEps]),
                static_cast<float>(step_size(age)),
                static_cast<float>(inverse_root(age)),
                {},
                hyper,
                {}};
    if (item.kind == kTouched) {
        std::copy_n(item.clock, kClock, rates.clock);
        tick(rates.clock, hyper);
    }
    if (item.cohort) rates.cohort_factors.resize(512);
    for (int64_t c = 0; c < item.cohorts; ++c) {
        rates.cohort_factors[c] = static_cast<float>(step_size(age - item.cohort_start[c]));
        rates.cohort_factors[256 + c] =
            static_cast<float>(inverse_root(age - item.cohort_start[c]));
    }
    return rates;
}

// The kept units an item names: inside the parameter, ascending; rows of a gradient in any order.
void check_units(const Item& item) {
    check_count(item.kind, "table.kind", kAll, kTouched);
    check_count(item.param_dtype, "table.param_dtype", kFloat, kHalf);
    check_count(item.grad_dtype, "table.grad_dtype", kFloat, kHalf);
    check_count(item.cohorts, "table.cohorts", 0, kCohorts);
    STD_TORCH_CHECK(item.rows >= 0 && item.columns >= 0 && item.units >= 0,
                    "table: expected sizes >= 0");
    const auto* index = static_cast<const int32_t*>(item.index);
    switch (item.kind) {
        case kRows:
            return check_index(index, item.units, "kept", 0, item.rows, true);
        case kColumns:
            return check_index(index, item.units, "kept", 0, item.columns, true);
        case kBlocks: {
            const int64_t high = item.block_rows, wide = item.block_columns;
            STD_TORCH_CHECK(
                high > 0 && wide > 0 && item.rows % high == 0 && item.columns % wide == 0,
                "blocks: expected blocks that divide the parameter");
            const int64_t units = item.rows / high * (item.columns / wide);
            return check_index(index, item.units, "kept", 0, units, true);
        }
        case kTouched:
            return check_index(index, item.units, "rows", -1, item.rows);
        default:
            return;
    }
}

// A number for the whole step, float32; `otherwise` where there is none.
float scalar(const std::optional<Tensor>& t, const char* name, float otherwise) {
    if (!t) return otherwise;
    check_cpu(*t, name);
    check_dtype(*t, name, ScalarType::Float);
    check_numel(*t, name, 1);
    return *static_cast<const float*>(t->const_data_ptr());
}

void step(const Tensor& table, const Tensor& chunk_table, const Tensor& hyper, Tensor partials,
          Tensor norm, int64_t, double max_grad_norm, const std::optional<Tensor>& grad_scale,
          const std::optional<Tensor>& found_inf) {
    check_tables(table, chunk_table, hyper, partials, norm, check_cpu);
    const auto* items = static_cast<const Item*>(table.const_data_ptr());
    const auto* chunks = static_cast<const Chunk*>(chunk_table.const_data_ptr());
    const auto* rows = static_cast<const double*>(hyper.const_data_ptr());
    auto* sums = static_cast<double*>(partials.mutable_data_ptr());
    const int64_t count = chunk_table.size(0), parameters = table.size(0);
    for (int64_t i = 0; i < parameters; ++i) {
        check_units(items[i]);
        check_count(items[i].group, "table.group", 0, hyper.size(0) - 1);
    }
    for (int64_t c = 0; c < count; ++c) {
        check_count(chunks[c].item, "chunks.item", 0, parameters - 1);
        STD_TORCH_CHECK(0 <= chunks[c].first && chunks[c].first <= chunks[c].end,
                        "chunks: expected units from 0 on");
    }
    const bool stays = scalar(found_inf, "found_inf", 0.0f) != 0;
    const double unscale = 1 / static_cast<double>(scalar(grad_scale, "grad_scale", 1.0f));
    double clip = 1;
    auto* norm_out = static_cast<float*>(norm.mutable_data_ptr());
    *norm_out = 0;
    if (max_grad_norm > 0) {
        for_each_in_ranges(count, torch::stable::get_num_threads(), [&](int64_t, int64_t c) {
            sums[c] = squares(items[chunks[c].item], chunks[c]);
        });
        double total = 0;
        for (int64_t c = 0; c < count; ++c) total += sums[c];
        *norm_out = static_cast<float>(std::sqrt(total) * std::fabs(unscale));
        const float share = static_cast<float>(max_grad_norm) / (*norm_out + 1e-6f);
        clip = share > 1 ? 1 : share;
    }
    if (stays) return;

    std::vector<Rates> rates;
    rates.reserve(parameters);
    for (int64_t i = 0; i < parameters; ++i)
        rates.push_back(make_rates(items[i], rows + items[i].group * kHypers, clip, unscale));
    for_each_in_ranges(count, torch::stable::get_num_threads(), [&](int64_t, int64_t c) {
        update(items[chunks[c].item], rates[chunks[c].item], chunks[c]);
    });
    for (int64_t i = 0; i < parameters; ++i) {
        *items[i].step += 1;
        if (items[i].kind == kTouched) std::copy_n(rates[i].clock, kClock, items[i].clock);
    }
}

// Rows of a sparse gradient, ascending and distinct, each summed in the order of its entries.
std::tuple<Tensor, Tensor> coalesce(const Tensor& rows, const Tensor& values) {
    check_dtype(rows, "rows", ScalarType::Long);
    check_dim(rows, "rows", 1);
    check_cpu(rows, "rows");
    check_cpu(values, "values");
    check_contiguous(rows, "rows");
    check_contiguous(values, "values");
    check_size(values, "values", 0, rows.size(0));
    const ScalarType dtype = values.scalar_type();
    const int64_t n = rows.size(0), wide = n ? values.numel() / n : 0;
    const int64_t type = dtype == ScalarType::Float      ? kFloat
                         : dtype == ScalarType::BFloat16 ? kBFloat16
                                                         : kHalf;
    STD_TORCH_CHECK(type != kHalf || dtype == ScalarType::Half,
                    "values: expected float32, bfloat16 or float16");
    Tensor touched = torch::stable::new_empty(rows, {n}, ScalarType::Int);
    Tensor sums = torch::stable::new_zeros(values, values.sizes(), ScalarType::Float);
    const auto* row = static_cast<const int64_t*>(rows.const_data_ptr());
    check_index(row, n, "rows", 0, INT32_MAX);  // named by int32
    auto* named = static_cast<int32_t*>(touched.mutable_data_ptr());
    auto* out = static_cast<float*>(sums.mutable_data_ptr());

    std::vector<int64_t> order(n), heads;
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [row](int64_t a, int64_t b) { return row[a] < row[b]; });
    for (int64_t i = 0; i < n; ++i)
        if (!i || row[order[i]] != row[order[i - 1]]) heads.push_back(i);
    const int64_t distinct = static_cast<int64_t>(heads.size());
    heads.push_back(n);
    std::fill(named, named + n, -1);
    torch::stable::parallel_for(0, distinct, 16, [&](int64_t begin, int64_t end) {
        std::vector<float> wider(type == kFloat ? 0 : wide);
        for (int64_t u = begin; u < end; ++u) {
            named[u] = static_cast<int32_t>(row[order[heads[u]]]);
            for (int64_t i = heads[u]; i < heads[u + 1]; ++i) {
                const char* from = at(values.const_data_ptr(), type, order[i] * wide);
                const auto* source = reinterpret_cast<const float*>(from);
                if (type != kFloat) {
                    widen(from, type, wider.data(), wide);
                    source = wider.data();
                }
                for (int64_t c = 0; c < wide; ++c) out[u * wide + c] += source[c];
            }
        }
    });
    return {touched, sums};
}

}  // namespace
}  // namespace sk::subset_adamw

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "subset_adamw_step(Tensor table, Tensor chunks, Tensor hyper, Tensor(a!) partials, "
        "Tensor(b!) norm, int dtypes, float max_grad_norm, Tensor? grad_scale, Tensor? found_inf) "
        "-> ()");
    m.def("subset_adamw_coalesce(Tensor rows, Tensor values) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("subset_adamw_step", TORCH_BOX(&sk::subset_adamw::step));
    m.impl("subset_adamw_coalesce", TORCH_BOX(&sk::subset_adamw::coalesce));
}
