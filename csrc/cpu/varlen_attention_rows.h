// The rows of varlen_attention.cpp: softmax, its backward, and the dropout of both.
//
// Sixteen Philox counters give a tile of 8 query rows by 16 keys. Counter `lane` serves key
// 16 b + lane; word w, half h serves row 8 t + 4 h + w; see `first_counter`.
#pragma once

#include "cpu/exponential.h"
#include "cpu/varlen_attention_products.h"

#include <cmath>
#include <limits>

#define SK_ALWAYS __attribute__((always_inline))

namespace {

constexpr int64_t kRows = 64;     // query rows in flight
constexpr int64_t kTileRows = 8;  // query rows of a Philox tile

// Dropout of one head of one sequence; `rate` 0 where nothing is dropped.
struct Drop {
    uint64_t seed;
    int64_t head, first_row;  // first_row: the packed row at which the sequence's queries start
    uint32_t threshold;
    float rate;  // 1 / keep probability

    bool active() const { return threshold < 65536; }
    // Tile t of a sequence is numbered first_row + t, below the next sequence's first.
    SK_INLINE uint64_t first_counter(int64_t tile, int64_t keys) const {
        const uint64_t row = static_cast<uint64_t>(head) << 28 | (first_row + tile);
        return (row << 20 | static_cast<uint64_t>(keys)) << 4;
    }
};

// -infinity for 0, else NaN: the logarithm of what has none.
SK_INLINE Vec lowest_of(const Vec& x) {
    return x == 0.0f ? Vec{} - std::numeric_limits<float>::infinity() : x - x;
}

// ln x for positive finite x: x = 2^n m, m in [sqrt(1/2), sqrt 2), by atanh to s^9 (1e-9 of it).
SK_INLINE Vec logarithm(const Vec& x) {
    const Bits n = ((Bits)x - 0x3f3504f3) >> 23;
    const Vec m = (Vec)((Bits)x - (n << 23));
    const Vec s = (m - 1.0f) / (m + 1.0f), t = s * s;
    Vec y = t * (1.0f / 9) + 1.0f / 7;
    y = y * t + 1.0f / 5;
    y = y * t + 1.0f / 3;
    y = y * t + 1.0f;
    y = __builtin_convertvector(n, Vec) * 0.69314718f + 2.0f * s * y;
    return ((Bits)x > 0) & ((Bits)x < 0x7f800000) ? y : lowest_of(x);
}

SK_INLINE Bits lane_numbers() {
    Bits lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane;
}

SK_INLINE Vec before(const Vec& v, int64_t keys, float otherwise) {
    return lane_numbers() < static_cast<int32_t>(keys) ? v : Vec{} + otherwise;
}

SK_INLINE float fold_max(Vec v) {
    const auto larger_of = [](Vec a, Vec b) SK_ALWAYS { return a > b ? a : b; };
    v = larger_of(v, exchange<8>(v));
    v = larger_of(v, exchange<4>(v));
    v = larger_of(v, exchange<2>(v));
    v = larger_of(v, exchange<1>(v));
    return v[0];
}

// Calls use(row, key, kept) for every row and vector of keys; `kept` is all ones or zero.
template <class F>
SK_INLINE void for_each_draw(const Drop& drop, int64_t first, int64_t rows, int64_t keys,
                             const F& use) {
    uint32_t words[4][kPhiloxLanes];
    for (int64_t i = 0; i < rows; i += kTileRows)
        for (int64_t j = 0; j < keys; j += kLanes) {
            philox(drop.seed, drop.first_counter((first + i) / kTileRows, j / kLanes), words);
            for (int64_t part = 0; part < std::min(kTileRows, rows - i); ++part) {
                Bits draw;
                std::memcpy(&draw, words[part & 3], 64);
                draw = (draw >> static_cast<int>(part >> 2) * 16) & 0xffff;
                use(i + part, j, draw < static_cast<int32_t>(drop.threshold));
            }
        }
}

// A row of scaled scores to e^(score - largest); returns the sum, `top` is the largest. What is
// subtracted is a score that was rounded as the others were, so no score's size matters.
SK_INLINE float exponentials(float* row, int64_t keys, float scale, float& top) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    Vec most = Vec{} + lowest;
    for (int64_t j = 0; j < keys; j += kLanes) {
        Vec v = load(row + j) * scale;
        if (j + kLanes > keys) v = before(v, keys - j, lowest);
        most = v > most ? v : most;
        store(row + j, v);
    }
    top = fold_max(most);
    Vec sum = {};
    for (int64_t j = 0; j < keys; j += kLanes) {
        Vec v = exponential(load(row + j) - top);
        if (j + kLanes > keys) v = before(v, keys - j, 0.0f);
        sum += v;
        store(row + j, v);
    }
    return fold(sum);
}

// Scores to e^(score - largest), dropped ones to 0; `inverse`: 1 / row sums, before dropout.
SK_CLONES void softmax(float* p, int64_t length, int64_t rows, int64_t keys, float scale,
                       const Drop& drop, int64_t first, float* inverse, float* logsumexp) {
    alignas(64) float tops[kRows] = {}, totals[kRows] = {};
    for (int64_t i = 0; i < rows; ++i)
        totals[i] = exponentials(p + i * length, keys, scale, tops[i]);
    for (int64_t i = 0; i < rows; i += kLanes) {
        store(inverse + i, keys ? 1.0f / load(totals + i) : Vec{});
        store(tops + i, load(tops + i) + logarithm(load(totals + i)));
    }
    std::memcpy(logsumexp, tops, static_cast<size_t>(rows) * 4);
    if (drop.active())
        for_each_draw(drop, first, rows, keys,
                      [&](int64_t i, int64_t j, const Bits& kept) SK_ALWAYS {
                          float* at = p + i * length + j;
                          store(at, (Vec)((Bits)load(at) & kept));
                      });
}

// Scores and dP to what dV and dQ, dK are made of: p = dropped P, g = P (g - sum of P g) scale.
SK_CLONES void softmax_backward(float* p, float* g, int64_t length, int64_t rows, int64_t keys,
                                float scale, const Drop& drop, int64_t first) {
    float inverse[kRows] = {}, top;
    for (int64_t i = 0; i < rows; ++i) inverse[i] = exponentials(p + i * length, keys, scale, top);
    for (int64_t i = 0; i < rows; i += kLanes) store(inverse + i, 1.0f / load(inverse + i));
    // A dropped probability is marked by its sign.
    if (drop.active())
        for_each_draw(drop, first, rows, keys,
                      [&](int64_t i, int64_t j, const Bits& kept) SK_ALWAYS {
                          float* at = p + i * length + j;
                          store(at, (Vec)((Bits)load(at) | (~kept & INT32_MIN)));
                      });
    for (int64_t i = 0; i < rows; ++i) {
        float *prow = p + i * length, *grow = g + i * length;
        Vec sum = {};
        for (int64_t j = 0; j < keys; j += kLanes) {
            const Vec v = load(prow + j) * inverse[i];
            Vec d = (Vec)((Bits)(load(grow + j) * drop.rate) & ((Bits)v >= 0));
            if (j + kLanes > keys) d = before(d, keys - j, 0.0f);
            sum += magnitude(v) * d;
            store(grow + j, d);
        }
        const float mean = fold(sum);
        for (int64_t j = 0; j < keys; j += kLanes) {
            const Vec v = load(prow + j) * inverse[i];
            store(grow + j, magnitude(v) * (load(grow + j) - mean) * scale);
            store(prow + j, (Vec)((Bits)(v * drop.rate) & ((Bits)v >= 0)));
        }
    }
}

template <class T>
SK_INLINE void drop_padded(T* p, int64_t rows, int64_t keys, const Drop& drop) {
    for_each_draw(drop, 0, rows, keys, [&](int64_t i, int64_t j, const Bits& kept) SK_ALWAYS {
        T* at = p + i * keys + j;
        if (j + kLanes <= keys) return write((Vec)((Bits)(read(at) * drop.rate) & kept), at);
        int32_t each[kLanes];
        std::memcpy(each, &kept, 64);
        for (int64_t lane = 0; j + lane < keys; ++lane)
            narrow(each[lane] ? widen(at[lane]) * drop.rate : 0.0f, at + lane);
    });
}

SK_CLONES void drop_float(float* p, int64_t rows, int64_t keys, const Drop& drop) {
    drop_padded(p, rows, keys, drop);
}

SK_CLONES void drop_bfloat16(uint16_t* p, int64_t rows, int64_t keys, const Drop& drop) {
    drop_padded(p, rows, keys, drop);
}

}  // namespace
