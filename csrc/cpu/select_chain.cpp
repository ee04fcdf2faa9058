// The knapsack of a chain whose backward pass stops at its lowest unit; chain.py has the rule.
#include "checks.h"

#include <algorithm>
#include <vector>

#define SK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

using sk::ScalarType;
using sk::Tensor;

// best[t] = max(best[t], best[t - cost] + worth) from the highest t down; notes what was taken.
SK_SIMD void add_unit(const double* __restrict before, double* __restrict after,
                      uint8_t* __restrict took, int64_t count, double worth) {
    for (int64_t t = 0; t < count; ++t) {
        const double with_it = before[t] + worth;
        took[t] = with_it > after[t];
        after[t] = std::max(after[t], with_it);
    }
}

template <class T>
const T* column(const Tensor& t, const char* name, ScalarType dtype, int64_t n) {
    sk::check_cpu(t, name);
    sk::check_dtype(t, name, dtype);
    sk::check_contiguous(t, name);
    sk::check_dim(t, name, 1);
    sk::check_size(t, name, 0, n);
    return static_cast<const T*>(t.const_data_ptr());
}

Tensor select_chain(const Tensor& value, const Tensor& own, const Tensor& passed, int64_t bins) {
    const int64_t n = value.numel();
    const auto* worth = column<double>(value, "value", ScalarType::Double, n);
    const auto* cost = column<int64_t>(own, "own", ScalarType::Long, n);
    const auto* reach = column<int64_t>(passed, "passed", ScalarType::Long, n);
    sk::check_count(bins, "bins", 1, INT32_MAX);
    // In buckets; bins + 1 is what no budget pays.
    sk::check_index(cost, n, "own", 0, bins + 2);
    sk::check_index(reach, n, "passed", 0, bins + 2);
    Tensor kept = torch::stable::new_zeros(value, {n}, ScalarType::Bool);
    const int64_t wide = bins + 1;
    std::vector<double> best(wide, 0.0), before(wide);
    std::vector<uint8_t> took(n * wide, 0);
    double top = 0;
    int64_t lowest = -1, left = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
        const int64_t room = bins - reach[i] - cost[i];
        if (room >= 0 && best[room] + worth[i] > top) {
            top = best[room] + worth[i];
            lowest = i;
            left = room;
        }
        if (cost[i] > bins) continue;
        before = best;
        add_unit(before.data(), best.data() + cost[i], took.data() + i * wide + cost[i],
                 wide - cost[i], worth[i]);
    }
    bool* flags = static_cast<bool*>(kept.mutable_data_ptr());
    if (lowest < 0) return kept;
    flags[lowest] = true;
    for (int64_t i = lowest + 1; i < n; ++i) {
        flags[i] = took[i * wide + left];
        if (flags[i]) left -= cost[i];
    }
    return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("select_chain(Tensor value, Tensor own, Tensor passed, int bins) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("select_chain", TORCH_BOX(&select_chain));
}
