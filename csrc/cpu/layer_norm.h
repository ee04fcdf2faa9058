// One row of a LayerNorm, forward and backward, and the draws of a dropout beside it.
//
// A row is widened to float32 once; every later pass finds it in the first cache.
#pragma once

#include "checks.h"
#include "cpu/column_sums.h"
#include "cpu/lanes.h"
#include "cpu/philox.h"

#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#define SK_LAMBDA __attribute__((always_inline))

namespace sk {

constexpr int kTile = 8 * kPhiloxLanes;

// Dropout of a flat tensor: element i is kept where its draw is below `threshold` of 65,536.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;
    float scale;

    Dropout(const std::optional<Tensor>& seed_, int64_t threshold_)
        : seed(0), threshold(static_cast<uint32_t>(threshold_)), scale(0.0f) {
        if (seed_) {
            check_cpu(*seed_, "seed");
            check_dtype(*seed_, "seed", ScalarType::Long);
            seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed_->data_ptr()));
        }
        STD_TORCH_CHECK(seed_ || threshold_ == 65536, "seed: expected one beside a dropout");
        if (threshold) scale = 65536.0f / static_cast<float>(threshold);
    }
    bool drops() const { return threshold < 65536; }
};

// A function of its own: where it is inlined, gcc may lose the vectors of the rounds.
SK_CLONES static void draw_tiles(uint64_t seed, int64_t begin, int64_t end,
                                 uint16_t* __restrict to) {
    uint32_t words[4][kPhiloxLanes];
    for (int64_t tile = begin; tile < end; ++tile, to += kTile) {
        philox(seed, static_cast<uint64_t>(tile) * kPhiloxLanes, words);
        for (int w = 0; w < 4; ++w)
            for (int i = 0; i < kPhiloxLanes; ++i) {
                to[w * kPhiloxLanes + i] = static_cast<uint16_t>(words[w][i]);
                to[64 + w * kPhiloxLanes + i] = static_cast<uint16_t>(words[w][i] >> 16);
            }
    }
}

// The draws of elements [first, first + n), in whole tiles into `buffer` (n + 2 tiles): word w,
// half h of lane l is element 64 h + 16 w + l of its tile.
inline const uint16_t* draw(const Dropout& dropout, int64_t first, int64_t n, uint16_t* buffer) {
    draw_tiles(dropout.seed, first / kTile, ceil_div(first + n, kTile), buffer);
    return buffer + first % kTile;
}

// Σ f(a[j], b[j]); f takes vectors and scalars alike.
template <class F>
SK_INLINE float sum_over(const float* a, const float* b, int64_t n, const F& f) {
    Vec sums[4] = {};
    float rest = 0.0f;
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes)
        for (int k = 0; k < 4; ++k)
            sums[k] += f(load(a + j + k * kLanes), load(b + j + k * kLanes));
    for (; j + kLanes <= n; j += kLanes) sums[0] += f(load(a + j), load(b + j));
    for (; j < n; ++j) rest += f(a[j], b[j]);
    return fold((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

struct Moments {
    float mean, rstd;
};

SK_INLINE Moments moments(const float* z, int64_t n, float eps) {
    const float count = static_cast<float>(n);
    const float mean =
        sum_over(z, z, n, [](const auto& v, const auto&) SK_LAMBDA { return v; }) / count;
    const float squares = sum_over(z, z, n, [mean](const auto& v, const auto&) SK_LAMBDA {
        const auto off = v - mean;
        return off * off;
    });
    return {mean, 1.0f / std::sqrt(squares / count + eps)};
}

// What a task works in: two rows of float32 and one of draws.
struct Scratch {
    std::vector<float> first, second;
    std::vector<uint16_t> draws;

    explicit Scratch(int64_t width) : first(width), second(width), draws(width + 2 * kTile) {}
};

// From dy and z (both float32, scratch) of a row: dz in place of z. Adds to dweight and dbias.
SK_INLINE void norm_backward_row(float* __restrict dy, float* __restrict z, Moments m,
                                 const float* __restrict weight, float* __restrict dweight,
                                 float* __restrict dbias, int64_t n) {
    if (dweight)
        for (int64_t j = 0; j < n; ++j) {
            const float normal = (z[j] - m.mean) * m.rstd;
            dweight[j] += dy[j] * normal;
            dbias[j] += dy[j];
            z[j] = normal;
            dy[j] *= weight[j];
        }
    else
        for (int64_t j = 0; j < n; ++j) {
            z[j] = (z[j] - m.mean) * m.rstd;
            dy[j] *= weight[j];
        }
    const float count = static_cast<float>(n);
    const float along =
        sum_over(dy, z, n, [](const auto& g, const auto& x) SK_LAMBDA { return g * x; }) / count;
    const float mean =
        sum_over(dy, z, n, [](const auto& g, const auto&) SK_LAMBDA { return g; }) / count;
    for (int64_t j = 0; j < n; ++j) z[j] = m.rstd * (dy[j] - mean - z[j] * along);
}

// Calls run with a null pointer of the element type of t, float32 or bfloat16.
template <class F>
void by_type(const Tensor& t, const char* name, const F& run) {
    if (t.scalar_type() == ScalarType::Float) return run(static_cast<float*>(nullptr));
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name,
                    ": expected float32 or bfloat16, got ", toString(t.scalar_type()));
    run(static_cast<uint16_t*>(nullptr));
}

// Data of a contiguous CPU tensor of `numel` elements.
template <class T>
T* data(const Tensor& t, const char* name, int64_t numel) {
    check_cpu(t, name);
    check_contiguous(t, name);
    constexpr ScalarType dtype = std::is_same_v<std::remove_const_t<T>, float> ? ScalarType::Float
                                 : std::is_same_v<std::remove_const_t<T>, int64_t>
                                     ? ScalarType::Long
                                     : ScalarType::BFloat16;
    check_dtype(t, name, dtype);
    STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got ", t.numel());
    return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t, const char* name, int64_t numel) {
    return t ? data<T>(*t, name, numel) : nullptr;
}

}  // namespace sk
