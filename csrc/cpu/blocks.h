// The register tile that every product with a block-sparse weight is made of.
//
// The dimension summed over comes in units of 4 bytes: one float, or two consecutive bfloat16.
// Sums are float, in a fixed order per output, so results do not depend on the number of threads.
#pragma once

#include "checks.h"
#include "parallel.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>

// gcc 12 warns of its own avx512fintrin.h.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define SK_FMA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define SK_INLINE inline __attribute__((always_inline))

namespace sk {

constexpr int64_t kLanes = 16;  // units in a vector
constexpr int64_t kChunk = 64;  // output columns summed at a time: four vectors

inline int64_t padded(int64_t width) {
    return ceil_div(width, kLanes) * kLanes;
}

template <bool BF16>
struct Unit {
    static constexpr int64_t terms = BF16 ? 2 : 1;
    static constexpr int64_t bytes = BF16 ? 2 : 4;
};

template <bool BF16>
SK_FMA SK_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    if constexpr (BF16)
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    else
        return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
}

// sum[m][v] += a[m][k] * b[k][v] over `units`; strides in bytes, b's rows begin with NV vectors.
template <bool BF16, int NV, int MR>
SK_FMA SK_INLINE void multiply(__m512 (&sum)[MR][NV], const char* a, int64_t a_m, int64_t a_k,
                               const char* b, int64_t b_k, int64_t units) {
    for (int64_t k = 0; k < units; ++k, a += a_k, b += b_k) {
        __m512i right[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) right[v] = _mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
            int32_t unit;
            std::memcpy(&unit, a + m * a_m, 4);
            const __m512i left = _mm512_set1_epi32(unit);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[m][v] = multiply_add<BF16>(sum[m][v], left, right[v]);
        }
    }
}

template <bool BF16>
SK_FMA SK_INLINE __m512 load(const void* p, int64_t i, __mmask16 valid) {
    if constexpr (BF16) {
        const __m256i half = _mm256_maskz_loadu_epi16(valid, static_cast<const uint16_t*>(p) + i);
        return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    } else {
        return _mm512_maskz_loadu_ps(valid, static_cast<const float*>(p) + i);
    }
}

template <bool BF16>
SK_FMA SK_INLINE void store(void* p, int64_t i, __mmask16 valid, __m512 v) {
    if constexpr (BF16) {
        uint16_t* to = static_cast<uint16_t*>(p) + i;
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
        if (valid == 0xffff)  // a masked store costs several plain ones
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
        else
            _mm256_mask_storeu_epi16(to, valid, half);
    } else {
        float* to = static_cast<float*>(p) + i;
        if (valid == 0xffff)
            _mm512_storeu_ps(to, v);
        else
            _mm512_mask_storeu_ps(to, valid, v);
    }
}

// 64 bytes of which the first `n` elements are read, the others zero.
template <bool BF16>
SK_FMA SK_INLINE __m512i load_bits(const char* p, int64_t n) {
    if constexpr (BF16)
        return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
    else
        return _mm512_maskz_loadu_epi32(n >= 16 ? 0xffff : (1 << n) - 1, p);
}

template <bool BF16>
SK_INLINE float scalar(const void* p, int64_t i) {
    if constexpr (!BF16) return static_cast<const float*>(p)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

SK_INLINE __mmask16 lanes(int64_t n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1;
}

// The first `columns` of NV vectors from element `i` on; whole ones in the widest stores there are.
template <bool BF16, int NV>
SK_FMA SK_INLINE void store_row(void* p, int64_t i, int64_t columns, const __m512 (&row)[NV]) {
    if constexpr (BF16 && NV % 2 == 0) {
        if (columns >= NV * 16) {
            uint16_t* to = static_cast<uint16_t*>(p) + i;
#pragma GCC unroll 2
            for (int v = 0; v < NV; v += 2)
                _mm512_storeu_si512(to + v * 16, (__m512i)_mm512_cvtne2ps_pbh(row[v + 1], row[v]));
            return;
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store<BF16>(p, i + v * 16, lanes(columns - v * 16), row[v]);
}

// A pair of rows as units: `to[j]` = even[j], odd[j]; without `odd` zero.
SK_FMA inline void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
        const __mmask16 valid = lanes(n - j);
        __m512i unit = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, even + j));
        if (odd) {
            const __m256i high = _mm256_maskz_loadu_epi16(valid, odd + j);
            unit = _mm512_or_si512(unit, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        }
        _mm512_mask_storeu_epi32(to + j, valid, unit);
    }
}

// Calls f<NV>() for the vectors that the columns from `column` on need.
template <class F>
SK_INLINE void by_vectors(int64_t columns, const F& f) {
    switch (std::min<int64_t>(4, ceil_div(columns, kLanes))) {
        case 1:
            return f(std::integral_constant<int, 1>());
        case 2:
            return f(std::integral_constant<int, 2>());
        case 3:
            return f(std::integral_constant<int, 3>());
        default:
            return f(std::integral_constant<int, 4>());
    }
}

inline const int32_t* int_data(const Tensor& t, const char* name) {
    check_cpu(t, name);
    check_dtype(t, name, ScalarType::Int);
    check_contiguous(t, name);
    return static_cast<const int32_t*>(t.data_ptr());
}

// How a product goes through the grid: `lines` of blocks make its `out_width` columns and read
// `in_width`; `entries` of the index.
struct Grid {
    bool transposed;
    int64_t lines, out_width, in_width, entries;
};

// That each line's blocks are blocks of `values`, read columns there are and write no others.
inline void check_grid(const Grid& grid, const Tensor& values, const int32_t* ptr,
                       const int32_t* idx, const int32_t* perm) {
    const int64_t n = values.size(0), rows = values.size(1), columns = values.size(2);
    STD_TORCH_CHECK(rows > 0 && columns > 0, "values: expected blocks with entries");
    STD_TORCH_CHECK(grid.lines >= 0 && grid.entries == n, "idx: expected ", n, " entries, got ",
                    grid.entries);
    const int64_t across = grid.transposed ? rows : columns;
    STD_TORCH_CHECK(grid.out_width >= 0 && grid.lines <= ceil_div(grid.out_width, across),
                    "ptr: expected no more lines than ", grid.out_width, " features make of ",
                    across, ", got ", grid.lines);
    check_pointers(ptr, grid.lines, "ptr", n);
    check_index(idx, n, "idx", 0, ceil_div(grid.in_width, grid.transposed ? columns : rows));
    if (perm) check_index(perm, n, "perm", 0, n);
}

inline bool check_activations(const Tensor& x, const char* name) {
    check_cpu(x, name);
    check_dim(x, name, 2);
    check_contiguous(x, name);
    const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
    if (!bf16) check_dtype(x, name, ScalarType::Float);
    return bf16;
}

}  // namespace sk
