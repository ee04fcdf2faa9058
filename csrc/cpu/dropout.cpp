// Dropout from a counter: nothing is stored, backward draws the same mask again.
//
// Philox4x32-10 (Salmon et al., SC 2011). Sixteen counters give 128 elements: counter `lane` of
// tile t is 16 t + lane, and its word w, half h is element 128 t + 64 h + 16 w + lane.
#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace {

using namespace sk;

constexpr int kLanes = kPhiloxLanes, kTile = 128;
constexpr int64_t kTilesPerTask = 128;

#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

template <class T>
inline __attribute__((always_inline)) void drop_tiles(const T* x, T* y, int64_t n, uint64_t seed,
                                                      uint32_t threshold, float scale,
                                                      int64_t begin, int64_t end) {
    uint32_t words[4][kLanes];
    for (int64_t tile = begin; tile < end; ++tile) {
        philox(seed, static_cast<uint64_t>(tile) * kLanes, words);
        const int64_t base = tile * kTile;
        if (base + kTile <= n) {
            for (int part = 0; part < 8; ++part)
                for (int i = 0; i < kLanes; ++i) {
                    const uint32_t draw = words[part & 3][i] >> (part >> 2) * 16 & 0xffff;
                    const int64_t e = base + part * kLanes + i;
                    narrow(draw < threshold ? widen(x[e]) * scale : 0.0f, y + e);
                }
        } else {
            for (int64_t e = base; e < n; ++e) {
                const int part = static_cast<int>(e - base) / kLanes, i = (e - base) % kLanes;
                const uint32_t draw = words[part & 3][i] >> (part >> 2) * 16 & 0xffff;
                narrow(draw < threshold ? widen(x[e]) * scale : 0.0f, y + e);
            }
        }
    }
}

SK_CLONES void drop_float(const float* x, float* y, int64_t n, uint64_t seed, uint32_t threshold,
                          float scale, int64_t begin, int64_t end) {
    drop_tiles(x, y, n, seed, threshold, scale, begin, end);
}

SK_CLONES void drop_bfloat16(const uint16_t* x, uint16_t* y, int64_t n, uint64_t seed,
                             uint32_t threshold, float scale, int64_t begin, int64_t end) {
    drop_tiles(x, y, n, seed, threshold, scale, begin, end);
}

// y = x · scale where the draw is below threshold (of 65,536), else 0.
void dropout(const Tensor& x, const Tensor& seed, int64_t threshold, Tensor& y) {
    check_cpu(x, "x");
    check_cpu(seed, "seed");
    check_cpu(y, "y");
    check_contiguous(x, "x");
    check_contiguous(y, "y");
    check_dtype(seed, "seed", ScalarType::Long);
    check_numel(seed, "seed", 1);
    check_count(threshold, "threshold", 0, 65536);
    check_dtype(y, "y", x.scalar_type());
    check_numel(y, "y", x.numel());
    const bool single = x.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(single || x.scalar_type() == ScalarType::BFloat16,
                    "x: expected float32 or bfloat16, got ", toString(x.scalar_type()));
    const int64_t n = x.numel(), tiles = ceil_div(n, kTile);
    const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
    const auto limit = static_cast<uint32_t>(threshold);
    const float scale = threshold ? 65536.0f / static_cast<float>(threshold) : 0.0f;
    const void* from = x.data_ptr();
    void* to = y.data_ptr();
    for_each(ceil_div(tiles, kTilesPerTask), [&](int64_t task) {
        const int64_t begin = task * kTilesPerTask, end = std::min(tiles, begin + kTilesPerTask);
        if (single)
            drop_float(static_cast<const float*>(from), static_cast<float*>(to), n, key, limit,
                       scale, begin, end);
        else
            drop_bfloat16(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), n, key,
                          limit, scale, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("dropout(Tensor x, Tensor seed, int threshold, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("dropout", TORCH_BOX(&dropout));
}
