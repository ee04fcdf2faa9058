// The products of varlen_attention.cpp and what packs their operands; included there only.
//
// C[m][n] = sum over k of A(m, k) B[k][n]: A is broadcast, B is rows of vectors, k is walked in
// order. Activations are widened to float32 when packed and narrowed when written.
#pragma once

#include "checks.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

using namespace sk;

int64_t padded(int64_t n) {
    return ceil_div(n, kLanes) * kLanes;
}

// Row length of a scratch matrix: an odd number of cache lines once rows would share sets.
int64_t row_length(int64_t n) {
    const int64_t lines = ceil_div(n, kLanes);
    return (lines > 4 ? lines | 1 : lines) * kLanes;
}

// One head's part of a `[tokens, heads, width]` tensor.
struct Rows {
    char* base;
    int64_t stride, width;  // elements
    bool bf16;

    Rows at(int64_t row, int64_t rows_apart = 0) const {
        return {base + (row * stride + rows_apart) * (bf16 ? 2 : 4), stride, width, bf16};
    }
};

typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef Halves UnalignedHalves __attribute__((aligned(2)));

SK_INLINE Vec read(const float* p) {
    return load(p);
}
SK_INLINE Vec read(const uint16_t* p) {
    const Halves v = *reinterpret_cast<const UnalignedHalves*>(p);
    return (Vec)(__builtin_convertvector(v, Words) << 16);
}
SK_INLINE void write(const Vec& v, float* p) {
    store(p, v);
}
SK_INLINE void write(const Vec& v, uint16_t* p) {
    const Words bits = (Words)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const auto nan = (Bits)(bits & 0x7fffffff) > 0x7f800000;
    const Words chosen = nan ? (bits >> 16 | 0x40) : rounded;
    *reinterpret_cast<UnalignedHalves*>(p) = __builtin_convertvector(chosen, Halves);
}

template <class T>
SK_INLINE void widen_all(const T* from, int64_t stride, int64_t width, int64_t n, float* to,
                         int64_t length) {
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < n; ++i, from += stride, to += length) {
        for (int64_t c = 0; c < whole; c += kLanes) store(to + c, read(from + c));
        if (whole < length) {
            store(to + whole, Vec{});
            for (int64_t c = whole; c < width; ++c) to[c] = widen(from[c]);
        }
    }
}

// `n` rows as float32, zero from `width` to `length` (less than a vector) and from row n to `rows`.
SK_CLONES void widen_rows(const Rows& from, int64_t n, int64_t rows, float* to, int64_t length) {
    if (from.bf16)
        widen_all(reinterpret_cast<const uint16_t*>(from.base), from.stride, from.width, n, to,
                  length);
    else
        widen_all(reinterpret_cast<const float*>(from.base), from.stride, from.width, n, to,
                  length);
    for (int64_t c = n * length; c < rows * length; c += kLanes) store(to + c, Vec{});
}

template <class T>
SK_INLINE void write_all(const float* from, int64_t length, int64_t n, const float* factors,
                         float factor, T* to, int64_t stride, int64_t width) {
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < n; ++i, from += length, to += stride) {
        const float by = factors ? factors[i] * factor : factor;
        for (int64_t c = 0; c < whole; c += kLanes) write(load(from + c) * by, to + c);
        for (int64_t c = whole; c < width; ++c) narrow(from[c] * by, to + c);
    }
}

// to[i] = from[i] * factor * factors[i], narrowed; `factors` may be null.
SK_CLONES void write_rows(const float* from, int64_t length, int64_t n, const float* factors,
                          float factor, const Rows& to) {
    if (to.bf16)
        write_all(from, length, n, factors, factor, reinterpret_cast<uint16_t*>(to.base), to.stride,
                  to.width);
    else
        write_all(from, length, n, factors, factor, reinterpret_cast<float*>(to.base), to.stride,
                  to.width);
}

template <int step>
SK_INLINE void exchange_rows(Vec (&v)[kLanes]) {
    Bits low, high;
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i & step ? kLanes + (i ^ step) : i;
        high[i] = i & step ? kLanes + i : i ^ step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & step)) {
            const Vec a = v[i], b = v[i + step];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + step] = __builtin_shuffle(a, b, high);
        }
}

// to[c][j] = from[j][c], sixteen by sixteen; both are padded to that.
SK_CLONES void transpose(const float* from, int64_t from_length, int64_t n, int64_t width,
                         float* to, int64_t to_length) {
    for (int64_t j = 0; j < n; j += kLanes)
        for (int64_t c = 0; c < width; c += kLanes) {
            Vec v[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) v[i] = load(from + (j + i) * from_length + c);
            exchange_rows<8>(v);
            exchange_rows<4>(v);
            exchange_rows<2>(v);
            exchange_rows<1>(v);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_length + j, v[i]);
        }
}

// A(m, k) = a[m * a_m + k * a_k].
struct Left {
    const float* a;
    int64_t a_m, a_k;
};

template <int MR, int NV>
SK_INLINE void tile(const Left& left, const float* b, int64_t b_length, float* c, int64_t c_length,
                    int64_t terms, bool add) {
    Vec sum[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[m][v] = add ? load(c + m * c_length + v * kLanes) : Vec{};
    const float* a = left.a;
    for (int64_t k = 0; k < terms; ++k, a += left.a_k, b += b_length) {
        Vec right[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[m][v] += a[m * left.a_m] * right[v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(c + m * c_length + v * kLanes, sum[m][v]);
}

template <int NV>
SK_INLINE void column_of_tiles(Left left, int64_t rows, const float* b, int64_t b_length, float* c,
                               int64_t c_length, int64_t terms, bool add) {
    for (; NV < 4 && rows > 4; rows -= 8, left.a += 8 * left.a_m, c += 8 * c_length)
        tile < 8, NV<4 ? NV : 1>(left, b, b_length, c, c_length, terms, add);
    for (; rows > 0; rows -= 4, left.a += 4 * left.a_m, c += 4 * c_length)
        tile<4, NV>(left, b, b_length, c, c_length, terms, add);
}

// C = A B, or C += A B: `rows` (rounded up to 4) by `columns` (to vectors) over `terms`.
SK_CLONES void product(const Left& left, int64_t rows, const float* b, int64_t b_length, float* c,
                       int64_t c_length, int64_t columns, int64_t terms, bool add) {
    for (int64_t vectors = (columns + kLanes - 1) / kLanes; vectors > 0;) {
        const int64_t now = vectors < 4 ? vectors : 4;
        if (now == 4)
            column_of_tiles<4>(left, rows, b, b_length, c, c_length, terms, add);
        else if (now == 3)
            column_of_tiles<3>(left, rows, b, b_length, c, c_length, terms, add);
        else if (now == 2)
            column_of_tiles<2>(left, rows, b, b_length, c, c_length, terms, add);
        else
            column_of_tiles<1>(left, rows, b, b_length, c, c_length, terms, add);
        b += now * kLanes, c += now * kLanes, vectors -= now;
    }
}

// How the heads of varlen_attention.cpp hold their operands: words of one float32.
struct Floats {
    static constexpr int64_t per_word = 1;

    static void load_rows(const Rows& from, int64_t n, int64_t rows, float* to, int64_t length) {
        widen_rows(from, n, rows, to, length);
    }
    static const float* right(const float* words, int64_t, int64_t, int64_t, float*, int64_t) {
        return words;
    }
    static Left left(float* p, int64_t length, int64_t, int64_t, float*) { return {p, length, 1}; }
    static Left turned(float* p, int64_t length, int64_t, int64_t) { return {p, 1, length}; }
    template <class... A>
    static void multiply(const A&... arguments) {
        product(arguments...);
    }
};

}  // namespace
