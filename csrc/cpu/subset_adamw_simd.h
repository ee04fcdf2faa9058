// Loops of the subset AdamW step over contiguous entries, compiled for three x86 levels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"

#if defined(__x86_64__)
#define SK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SK_SIMD
#endif

namespace sk::subset_adamw {

using Doubles = double __attribute__((vector_size(64)));

struct Factors {
    float scale, decay, rate1, beta2, rate2, step_size, inverse_root, eps;
};

// Where the next piece lies, in entries from this one: it is fetched meanwhile. 0: nowhere.
struct Ahead {
    int64_t weight, grad, state;
    bool jumps;  // to where the hardware does not look
};

// Into L2: on its way to L1 a line far away holds one of the few places that loads wait in.
inline __attribute__((always_inline)) void fetch_far(const void* line) {
    __builtin_prefetch(line, 0, 2);
}
inline __attribute__((always_inline)) void fetch(const void* line, bool far) {
    far ? fetch_far(line) : __builtin_prefetch(line);
}

// Adds Σ|w·g| and Σg² of sixteen entries to sixteen lanes each.
inline __attribute__((always_inline)) void add_lanes(const float* w, const float* g, Vec& product,
                                                     Vec& square) {
    const Vec grad = load(g);
    product += magnitude(load(w) * grad);
    square += grad * grad;
}

inline __attribute__((always_inline)) void adamw_entries(
    float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
    int64_t n, float scale, float decay, float rate1, float beta2, float rate2, float step_size,
    float inverse_root, float eps) {
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * scale;
        const float first = m[i] + (grad - m[i]) * rate1;
        const float second = beta2 * v[i] + rate2 * grad * grad;
        m[i] = first;
        v[i] = second;
        w[i] = w[i] * decay - step_size * (first / (std::sqrt(second) * inverse_root + eps));
    }
}

template <bool sums>
inline __attribute__((always_inline)) void adamw_run(float* w, const float* g, float* m, float* v,
                                                     int64_t n, const Factors& f, Ahead ahead,
                                                     float* lanes) {
    constexpr int64_t kPart = 128;  // entries between two looks ahead
    Vec product = {}, square = {};
    if (sums) {
        std::memcpy(&product, lanes, sizeof product);
        std::memcpy(&square, lanes + 16, sizeof square);
    }
    for (int64_t i = 0; i < n; i += kPart) {
        const int64_t part = n - i < kPart ? n - i : kPart;
        for (int64_t j = i; j < i + part; j += 16) {
            if (ahead.weight) fetch(w + ahead.weight + j, ahead.jumps);
            if (ahead.grad) fetch(g + ahead.grad + j, ahead.jumps);
            if (ahead.state) fetch_far(m + ahead.state + j), fetch_far(v + ahead.state + j);
        }
        if (sums) {
            int64_t j = i;
            for (; j + 16 <= i + part; j += 16) add_lanes(w + j, g + j, product, square);
            for (; j < i + part; ++j) {
                product[j % 16] += std::fabs(w[j] * g[j]);
                square[j % 16] += g[j] * g[j];
            }
        }
        adamw_entries(w + i, g + i, m + i, v + i, part, f.scale, f.decay, f.rate1, f.beta2, f.rate2,
                      f.step_size, f.inverse_root, f.eps);
    }
    if (sums) {
        std::memcpy(lanes, &product, sizeof product);
        std::memcpy(lanes + 16, &square, sizeof square);
    }
}

SK_SIMD static void adamw(float* w, const float* g, float* m, float* v, int64_t n, const Factors& f,
                          Ahead ahead) {
    adamw_run<false>(w, g, m, v, n, f, ahead, nullptr);
}

SK_SIMD static void adamw_sums(float* w, const float* g, float* m, float* v, int64_t n,
                               const Factors& f, Ahead ahead, float* lanes) {
    adamw_run<true>(w, g, m, v, n, f, ahead, lanes);
}

SK_SIMD static void adamw_cohorts(float* __restrict w, const float* __restrict g,
                                  float* __restrict m, float* __restrict v,
                                  const uint8_t* __restrict cohort, int64_t n, const Factors& f,
                                  const float* __restrict factors) {
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * f.scale;
        const float first = m[i] + (grad - m[i]) * f.rate1;
        const float second = f.beta2 * v[i] + f.rate2 * grad * grad;
        const int which = cohort[i];
        m[i] = first;
        v[i] = second;
        w[i] = w[i] * f.decay -
               factors[which] * (first / (std::sqrt(second) * factors[256 + which] + f.eps));
    }
}

// The sums alone.
SK_SIMD static void sum_lanes(const float* w, const float* g, int64_t n, float* lanes) {
    Vec product, square;
    std::memcpy(&product, lanes, sizeof product);
    std::memcpy(&square, lanes + 16, sizeof square);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) add_lanes(w + i, g + i, product, square);
    std::memcpy(lanes, &product, sizeof product);
    std::memcpy(lanes + 16, &square, sizeof square);
    for (; i < n; ++i) {
        lanes[i % 16] += std::fabs(w[i] * g[i]);
        lanes[16 + i % 16] += g[i] * g[i];
    }
}

// The two sums of the lanes, which start anew.
SK_SIMD static void fold_lanes(float* lanes, float* sums) {
    sums[0] = fold(load(lanes));
    sums[1] = fold(load(lanes + 16));
    std::memset(lanes, 0, 2 * sizeof(Vec));
}

// The same where every entry is its own row.
SK_SIMD static void sum_entries(const float* __restrict w, const float* __restrict g,
                                const int32_t* index, int64_t n, float* __restrict product,
                                float* __restrict square, float unscale) {
    if (product)
        for (int64_t i = 0; i < n; ++i)
            product[index ? index[i] : i] += std::fabs(w[i] * g[i]) * unscale;
    if (square)
        for (int64_t i = 0; i < n; ++i)
            square[index ? index[i] : i] += g[i] * g[i] * (unscale * unscale);
}

SK_SIMD static double sum_of_squares(const float* g, int64_t n) {
    Doubles low = {}, high = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 8; ++j) {
            const double a = g[i + j], b = g[i + 8 + j];
            low[j] += a * a;
            high[j] += b * b;
        }
    }
    low += high;
    double total = 0;
    for (int j = 0; j < 8; ++j) total += low[j];
    for (; i < n; ++i) total += static_cast<double>(g[i]) * g[i];
    return total;
}

SK_SIMD static void widen_bfloat16(const uint16_t* __restrict from, float* __restrict to,
                                   int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        std::memcpy(to + i, &bits, 4);
    }
}

SK_SIMD static void narrow_bfloat16(const float* __restrict from, uint16_t* __restrict to,
                                    int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

SK_SIMD static void widen_half(const _Float16* __restrict from, float* __restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

SK_SIMD static void narrow_half(const float* __restrict from, _Float16* __restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<_Float16>(from[i]);
}

// The entries `index` names, one by one: gather instructions took longer.
template <class T>
void take_named(const T* from, const int32_t* index, int64_t ahead, T* to, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const int32_t* at = index + i;
        const T a = from[at[0]], b = from[at[1]], c = from[at[2]], d = from[at[3]];
        if (ahead)
            for (int j = 0; j < 4; ++j) fetch_far(from + ahead + at[j]);
        to[i] = a;
        to[i + 1] = b;
        to[i + 2] = c;
        to[i + 3] = d;
    }
    for (; i < n; ++i) to[i] = from[index[i]];
}

// Entries whose bit is set, zero elsewhere; `to` may be `from`.
SK_SIMD static void mask_entries(const uint8_t* bits, int64_t origin, const float* from, float* to,
                                 int64_t n) {
    int64_t i = 0;
    if (origin % 8 == 0) {
        for (; i + 8 <= n; i += 8) {
            const int byte = bits[(origin + i) >> 3];
            for (int j = 0; j < 8; ++j) to[i + j] = byte >> j & 1 ? from[i + j] : 0.0f;
        }
    }
    for (; i < n; ++i) to[i] = bits[(origin + i) >> 3] >> ((origin + i) & 7) & 1 ? from[i] : 0.0f;
}

// What a row has waited for: decay of weight and moments, and the way its momentum still had to go.
SK_SIMD static void make_up(float* __restrict w, float* __restrict m, float* __restrict v,
                            int64_t n, float decay, float rest1, float rest2, float moves,
                            float eps) {
    for (int64_t i = 0; i < n; ++i) {
        w[i] = w[i] * decay - moves * (m[i] / (std::sqrt(v[i]) + eps));
        m[i] *= rest1;
        v[i] *= rest2;
    }
}

}  // namespace sk::subset_adamw
