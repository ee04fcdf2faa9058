// The products of varlen_attention.cpp in bfloat16, where the processor has them (AVX512_BF16).
//
// A word is a pair of bfloat16 along the dimension summed over; sums are float32. A left operand
// has pairs in its rows, or is zipped: a word takes one column of two rows. A right one is zipped.
#pragma once

#include "cpu/varlen_attention_products.h"

#include <immintrin.h>

// gcc 12 warns of its own avx512fintrin.h.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define SK_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace {

SK_PAIRS SK_INLINE __m512bh both(const float* high, const float* low) {
    return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
}

// Rows narrowed to words: `length` floats to half as many, a multiple of two vectors but the last.
SK_PAIRS void narrow_rows(const float* from, int64_t length, int64_t n, int64_t width, float* to,
                          int64_t to_length) {
    for (int64_t i = 0; i < n; ++i, from += length, to += to_length)
        for (int64_t c = 0; c < width; c += 2 * kLanes) {
            if (c + kLanes < width)
                _mm512_storeu_si512(to + c / 2, (__m512i)both(from + c + kLanes, from + c));
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c / 2),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c)));
        }
}

// Two rows narrowed to one, over the first half of the same place; `n` rows, a zero one if odd.
SK_PAIRS void zip_narrowed(float* p, int64_t length, int64_t n, int64_t width) {
    alignas(64) uint16_t order[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes);
    const __m512i turn = _mm512_load_si512(order);
    if (n % 2) std::memset(p + n * length, 0, static_cast<size_t>(padded(width)) * 4);
    for (int64_t i = 0; i < n; i += 2) {
        const float* from = p + i * length;
        float* to = p + i / 2 * length;
        for (int64_t c = 0; c < width; c += kLanes) {
            const __m512i v = (__m512i)both(from + length + c, from + c);
            _mm512_storeu_si512(to + c, _mm512_permutexvar_epi16(turn, v));
        }
    }
}

template <int MR, int NV>
SK_PAIRS SK_INLINE void pair_tile(const Left& left, const float* b, int64_t b_length, float* c,
                                  int64_t c_length, int64_t terms, bool add) {
    __m512 sum[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            sum[m][v] = add ? _mm512_loadu_ps(c + m * c_length + v * kLanes) : _mm512_setzero_ps();
    const float* a = left.a;
    for (int64_t k = 0; k < terms; ++k, a += left.a_k, b += b_length) {
        __m512bh right[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) right[v] = (__m512bh)_mm512_loadu_ps(b + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const __m512bh one = (__m512bh)_mm512_set1_ps(a[m * left.a_m]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], one, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) _mm512_storeu_ps(c + m * c_length + v * kLanes, sum[m][v]);
}

template <int NV>
SK_PAIRS SK_INLINE void column_of_pair_tiles(Left left, int64_t rows, const float* b,
                                             int64_t b_length, float* c, int64_t c_length,
                                             int64_t terms, bool add) {
    constexpr int many = NV < 4 ? 8 : 6;
    for (; rows > 4; rows -= many, left.a += many * left.a_m, c += many * c_length)
        pair_tile<many, NV>(left, b, b_length, c, c_length, terms, add);
    // No tile may end beyond the rows rounded up to 4: what follows is another matrix.
    if (rows > 2)
        pair_tile<4, NV>(left, b, b_length, c, c_length, terms, add);
    else if (rows > 0)
        pair_tile<2, NV>(left, b, b_length, c, c_length, terms, add);
}

// As `product`, in words.
SK_PAIRS void pair_product(const Left& left, int64_t rows, const float* b, int64_t b_length,
                           float* c, int64_t c_length, int64_t columns, int64_t terms, bool add) {
    for (int64_t vectors = (columns + kLanes - 1) / kLanes; vectors > 0;) {
        const int64_t now = vectors < 4 ? vectors : 4;
        if (now == 4)
            column_of_pair_tiles<4>(left, rows, b, b_length, c, c_length, terms, add);
        else if (now == 3)
            column_of_pair_tiles<3>(left, rows, b, b_length, c, c_length, terms, add);
        else if (now == 2)
            column_of_pair_tiles<2>(left, rows, b, b_length, c, c_length, terms, add);
        else
            column_of_pair_tiles<1>(left, rows, b, b_length, c, c_length, terms, add);
        b += now * kLanes, c += now * kLanes, vectors -= now;
    }
}

// How the heads of varlen_attention.cpp hold their operands: words of two elements.
struct Pairs {
    static constexpr int64_t per_word = 2;

    // `n` rows in words, zero from the width to `length` words and from row n to `rows`.
    static void load_rows(const Rows& from, int64_t n, int64_t rows, float* to, int64_t length) {
        for (int64_t i = 0; i < n; ++i)
            copy_row(from.base + i * from.stride * 2, from.width * 2, to + i * length, length * 4);
        std::memset(to + n * length, 0, static_cast<size_t>((rows - n) * length) * 4);
    }
    // The right operand of a sum over rows, from the words of `load_rows`, `rows` of them even.
    static const float* right(const float* words, int64_t length, int64_t rows, int64_t width,
                              float* to, int64_t to_length) {
        zip_rows(words, length, rows, width, to, to_length);
        return to;
    }
    // The left operand of a sum over keys.
    static Left left(float* p, int64_t length, int64_t n, int64_t keys, float* to) {
        narrow_rows(p, length, n, keys, to, length / 2);
        return {to, length / 2, 1};
    }
    // The left operand of a sum over query rows; overwrites `p`.
    static Left turned(float* p, int64_t length, int64_t n, int64_t keys) {
        zip_narrowed(p, length, n, keys);
        return {p, 1, length};
    }
    template <class... A>
    static void multiply(const A&... arguments) {
        pair_product(arguments...);
    }
    static bool available() {
        static const bool has =
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bf16");
        return has;
    }

  private:
    static void copy_row(const char* from, int64_t bytes, float* to, int64_t room) {
        std::memcpy(to, from, static_cast<size_t>(bytes));
        std::memset(reinterpret_cast<char*>(to) + bytes, 0, static_cast<size_t>(room - bytes));
    }
    SK_PAIRS static void zip_rows(const float* from, int64_t length, int64_t rows, int64_t width,
                                  float* to, int64_t to_length) {
        alignas(64) uint16_t order[2 * kLanes];
        for (int i = 0; i < 2 * kLanes; ++i)
            order[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes);
        const __m512i turn = _mm512_load_si512(order);
        for (int64_t i = 0; i < rows; i += 2, from += 2 * length, to += to_length) {
            const char *low = reinterpret_cast<const char*>(from),
                       *high = reinterpret_cast<const char*>(from + length);
            for (int64_t c = 0; c < width; c += kLanes) {
                const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + 2 * c)),
                              b = _mm256_loadu_si256(
                                  reinterpret_cast<const __m256i*>(high + 2 * c));
                const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
                _mm512_storeu_si512(to + c, _mm512_permutexvar_epi16(turn, v));
            }
        }
    }
};

}  // namespace
