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

// The keys that a block of query rows meets: `columns` of them from `begin` on, where a vector
// begins. Row i of the block meets those from low(i) to high(i), counted from `begin`.
struct Band {
    int64_t begin, columns;
    int64_t place, reach;  // of the first row among the columns; to either side, -1 for all

    static Band whole(int64_t keys) { return {0, keys, 0, -1}; }
    SK_INLINE int64_t low(int64_t i) const { return within(place + i - reach); }
    SK_INLINE int64_t high(int64_t i) const { return within(place + i + reach + 1); }
    // The first vector of a row.
    SK_INLINE int64_t vector(int64_t i) const { return low(i) / kLanes * kLanes; }
    // Zero in the vectors of a row where it meets no key.
    SK_INLINE void clear(float* row, int64_t i) const {
        for (int64_t j = 0; j < vector(i); j += kLanes) store(row + j, Vec{});
        for (int64_t j = padded(high(i)); j < columns; j += kLanes) store(row + j, Vec{});
    }

  private:
    SK_INLINE int64_t within(int64_t j) const { return std::min(std::max<int64_t>(j, 0), columns); }
};

// A band of all keys, known when compiled: what is done for a window costs nothing without one.
struct Whole {
    static constexpr int64_t begin = 0;
    int64_t columns;

    SK_INLINE int64_t low(int64_t) const { return 0; }
    SK_INLINE int64_t high(int64_t) const { return columns; }
    SK_INLINE int64_t vector(int64_t) const { return 0; }
    SK_INLINE void clear(float*, int64_t) const {}
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

// v in the lanes from `low` up to `high`.
SK_INLINE Vec between(Vec v, int64_t low, int64_t high, float otherwise) {
    if (high < kLanes) v = before(v, high, otherwise);
    if (low > 0) v = lane_numbers() < static_cast<int32_t>(low) ? Vec{} + otherwise : v;
    return v;
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
template <class B, class F>
SK_INLINE void for_each_draw(const Drop& drop, int64_t first, int64_t rows, const B& band,
                             const F& use) {
    uint32_t words[4][kPhiloxLanes];
    for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t parts = std::min(kTileRows, rows - i), end = band.high(i + parts - 1);
        for (int64_t j = band.vector(i); j < end; j += kLanes) {
            const int64_t keys = (band.begin + j) / kLanes;
            philox(drop.seed, drop.first_counter((first + i) / kTileRows, keys), words);
            for (int64_t part = 0; part < parts; ++part) {
                Bits draw;
                std::memcpy(&draw, words[part & 3], 64);
                draw = (draw >> static_cast<int>(part >> 2) * 16) & 0xffff;
                use(i + part, j, draw < static_cast<int32_t>(drop.threshold));
            }
        }
    }
}

// A row of scaled scores to e^(score - largest), between `low`, in the first vector, and `high`;
// returns the sum, `top` is the largest. What is subtracted is a score that was rounded as the
// others were, so no score's size matters.
SK_INLINE float exponentials(float* row, int64_t low, int64_t high, float scale, float& top) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    Vec most = Vec{} + lowest;
    for (int64_t j = 0; j < high; j += kLanes) {
        const Vec v = between(load(row + j) * scale, low - j, high - j, lowest);
        most = v > most ? v : most;
        store(row + j, v);
    }
    top = fold_max(most);
    Vec sum = {};
    for (int64_t j = 0; j < high; j += kLanes) {
        const Vec v = between(exponential(load(row + j) - top), low - j, high - j, 0.0f);
        sum += v;
        store(row + j, v);
    }
    return fold(sum);
}

// As above, for row i of a block; zero where it meets no key.
template <class B>
SK_INLINE float exponentials(float* row, int64_t i, const B& band, float scale, float& top) {
    const int64_t at = band.vector(i);
    band.clear(row, i);
    return exponentials(row + at, band.low(i) - at, band.high(i) - at, scale, top);
}

// 0 for a row without a key.
SK_INLINE Vec inverse_of(const Vec& sum) {
    return sum == 0.0f ? Vec{} : 1.0f / sum;
}

// Scores to e^(score - largest), dropped ones to 0; `inverse`: 1 / row sums, before dropout.
template <class B>
SK_INLINE void softmax_of(float* p, int64_t length, int64_t rows, const B& band, float scale,
                          const Drop& drop, int64_t first, float* inverse, float* logsumexp) {
    alignas(64) float tops[kRows] = {}, totals[kRows] = {};
    for (int64_t i = 0; i < rows; ++i)
        totals[i] = exponentials(p + i * length, i, band, scale, tops[i]);
    for (int64_t i = 0; i < rows; i += kLanes) {
        store(inverse + i, inverse_of(load(totals + i)));
        store(tops + i, load(tops + i) + logarithm(load(totals + i)));
    }
    std::memcpy(logsumexp, tops, static_cast<size_t>(rows) * 4);
    if (drop.active())
        for_each_draw(drop, first, rows, band,
                      [&](int64_t i, int64_t j, const Bits& kept) SK_ALWAYS {
                          float* at = p + i * length + j;
                          store(at, (Vec)((Bits)load(at) & kept));
                      });
}

SK_CLONES void softmax(float* p, int64_t length, int64_t rows, const Band& band, float scale,
                       const Drop& drop, int64_t first, float* inverse, float* logsumexp) {
    if (band.reach >= 0)
        softmax_of(p, length, rows, band, scale, drop, first, inverse, logsumexp);
    else
        softmax_of(p, length, rows, Whole{band.columns}, scale, drop, first, inverse, logsumexp);
}

// Scores and dP to what dV and dQ, dK are made of: p = dropped P, g = P (g - sum of P g) scale.
template <class B>
SK_INLINE void softmax_backward_of(float* p, float* g, int64_t length, int64_t rows, const B& band,
                                   float scale, const Drop& drop, int64_t first) {
    float inverse[kRows] = {}, top;
    for (int64_t i = 0; i < rows; ++i)
        inverse[i] = exponentials(p + i * length, i, band, scale, top);
    for (int64_t i = 0; i < rows; i += kLanes) store(inverse + i, inverse_of(load(inverse + i)));
    // A dropped probability is marked by its sign.
    if (drop.active())
        for_each_draw(drop, first, rows, band,
                      [&](int64_t i, int64_t j, const Bits& kept) SK_ALWAYS {
                          float* at = p + i * length + j;
                          store(at, (Vec)((Bits)load(at) | (~kept & INT32_MIN)));
                      });
    for (int64_t i = 0; i < rows; ++i) {
        float *prow = p + i * length, *grow = g + i * length;
        const int64_t low = band.low(i), high = band.high(i);
        band.clear(grow, i);
        Vec sum = {};
        for (int64_t j = band.vector(i); j < high; j += kLanes) {
            const Vec v = load(prow + j) * inverse[i];
            Vec d = (Vec)((Bits)(load(grow + j) * drop.rate) & ((Bits)v >= 0));
            d = between(d, low - j, high - j, 0.0f);
            sum += magnitude(v) * d;
            store(grow + j, d);
        }
        const float mean = fold(sum);
        for (int64_t j = band.vector(i); j < high; j += kLanes) {
            const Vec v = load(prow + j) * inverse[i];
            store(grow + j, magnitude(v) * (load(grow + j) - mean) * scale);
            store(prow + j, (Vec)((Bits)(v * drop.rate) & ((Bits)v >= 0)));
        }
    }
}

SK_CLONES void softmax_backward(float* p, float* g, int64_t length, int64_t rows, const Band& band,
                                float scale, const Drop& drop, int64_t first) {
    if (band.reach >= 0)
        softmax_backward_of(p, g, length, rows, band, scale, drop, first);
    else
        softmax_backward_of(p, g, length, rows, Whole{band.columns}, scale, drop, first);
}

template <class T>
SK_INLINE void drop_padded(T* p, int64_t rows, int64_t keys, const Drop& drop) {
    const Whole all{keys};
    for_each_draw(drop, 0, rows, all, [&](int64_t i, int64_t j, const Bits& kept) SK_ALWAYS {
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
