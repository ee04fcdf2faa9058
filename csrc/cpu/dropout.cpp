// Dropout from a counter: nothing is stored, backward draws the same mask again.
//
// Philox4x32-10 (Salmon et al., SC 2011). Sixteen counters give 128 elements: counter `lane` of
// tile t is 16 t + lane, and its word w, half h is element 128 t + 64 h + 16 w + lane.
#include "checks.h"
#include "cpu/parallel.h"

#include <cstring>

namespace {

using namespace sk;

constexpr int kLanes = 16, kTile = 128;
constexpr int64_t kTilesPerTask = 128;

#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

inline float widen(float x) {
    return x;
}

inline float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline void narrow(float x, float* y) {
    *y = x;
}

inline void narrow(float x, uint16_t* y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *y = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : rounded);
}

// out[w][lane]: the four words of sixteen counters from `first`.
inline __attribute__((always_inline)) void philox(uint64_t seed, uint64_t first,
                                                  uint32_t out[4][kLanes]) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t counter = first + i;
        out[0][i] = static_cast<uint32_t>(counter);
        out[1][i] = static_cast<uint32_t>(counter >> 32);
        out[2][i] = out[3][i] = 0;
    }
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kLanes; ++i) {
            const uint64_t a = static_cast<uint64_t>(out[0][i]) * 0xD2511F53u;
            const uint64_t b = static_cast<uint64_t>(out[2][i]) * 0xCD9E8D57u;
            const uint32_t w0 = static_cast<uint32_t>(b >> 32) ^ out[1][i] ^ k0;
            const uint32_t w2 = static_cast<uint32_t>(a >> 32) ^ out[3][i] ^ k1;
            out[0][i] = w0;
            out[1][i] = static_cast<uint32_t>(b);
            out[2][i] = w2;
            out[3][i] = static_cast<uint32_t>(a);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

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
    check_dtype(y, "y", x.scalar_type());
    STD_TORCH_CHECK(y.numel() == x.numel(), "y: expected ", x.numel(), " elements, got ",
                    y.numel());
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
