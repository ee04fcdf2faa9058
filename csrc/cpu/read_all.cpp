// What the machine's memory gives: a bare streaming read, for the benchmarks.
#include "checks.h"
#include "cpu/ranges.h"

#include <algorithm>
#include <atomic>

#define SK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

using sk::ScalarType;
using sk::Tensor;

SK_SIMD int64_t xor_of(const int64_t* p, int64_t n) {
    typedef int64_t Words __attribute__((vector_size(64), aligned(8)));
    Words acc[4] = {};
    const Words* v = reinterpret_cast<const Words*>(p);
    for (int64_t i = 0; i < n / 32; ++i)
        for (int u = 0; u < 4; ++u) acc[u] ^= v[4 * i + u];
    acc[0] ^= acc[1] ^ acc[2] ^ acc[3];
    int64_t all = 0;
    for (int i = 0; i < 8; ++i) all ^= acc[0][i];
    return all;
}

// Reads every byte and does nothing else.
int64_t read_all(Tensor words) {
    sk::check_cpu(words, "words");
    sk::check_dtype(words, "words", ScalarType::Long);
    sk::check_contiguous(words, "words");
    const int64_t* p = static_cast<const int64_t*>(words.data_ptr());
    constexpr int64_t kSlice = 1 << 15;
    std::atomic<int64_t> all{0};
    const int64_t slices = (words.numel() + kSlice - 1) / kSlice;
    sk::for_each_in_ranges(slices, torch::stable::get_num_threads(), [&](int64_t, int64_t i) {
        const int64_t n = std::min(kSlice, words.numel() - i * kSlice);
        all.fetch_xor(xor_of(p + i * kSlice, n), std::memory_order_relaxed);
    });
    return all.load();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("read_all(Tensor words) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("read_all", TORCH_BOX(&read_all));
}
