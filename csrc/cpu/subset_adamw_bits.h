// Entries named by packed bits, taken out of a run and put back sixteen at a time, with AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define SK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))
#else
#define SK_AVX512
#endif

namespace sk::subset_adamw {

// Bits of the next `left` entries, 64 at most.
inline uint64_t bits_of(const uint8_t* bits, int64_t left) {
    uint64_t word = 0;
    if (left >= 64) {
        std::memcpy(&word, bits, 8);
        return word;
    }
    std::memcpy(&word, bits, (left + 7) / 8);
    return word & ((1ull << left) - 1);
}

#if defined(__x86_64__)

inline bool has_compress() {
    static const bool found =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("popcnt");
    return found;
}

SK_AVX512 static int64_t count_bits(const uint8_t* bits, int64_t span) {
    int64_t total = 0;
    for (int64_t i = 0; i < span; i += 64) total += _mm_popcnt_u64(bits_of(bits + i / 8, span - i));
    return total;
}

SK_AVX512 inline __m512i load_some(const uint32_t* from, __mmask16 which) {
    return _mm512_maskz_loadu_epi32(which, from);
}
SK_AVX512 inline __m512i load_some(const uint16_t* from, __mmask16 which) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from));
}
// Masked loads take longer.
SK_AVX512 inline __m512i load_all(const uint32_t* from) {
    return _mm512_loadu_si512(from);
}
SK_AVX512 inline __m512i load_all(const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
SK_AVX512 inline void store_some(uint32_t* to, __mmask16 which, __m512i values) {
    _mm512_mask_storeu_epi32(to, which, values);
}
SK_AVX512 inline void store_some(uint16_t* to, __mmask16 which, __m512i values) {
    _mm256_mask_storeu_epi16(to, which, _mm512_cvtepi32_epi16(values));
}
SK_AVX512 inline void store_all(uint32_t* to, __m512i values) {
    _mm512_storeu_si512(to, values);
}
SK_AVX512 inline void store_all(uint16_t* to, __m512i values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(values));
}
SK_AVX512 inline void store_half(uint32_t* to, __m512i values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(values));
}
SK_AVX512 inline void store_half(uint16_t* to, __m512i values) {
    const __m256i low = _mm512_castsi512_si256(values);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtepi32_epi16(low));
}

// Entries of `span` whose bit is set, one after the other; writes up to 15 entries more.
// `sparse`: of sixteen hardly ever more than eight, and half a store seldom crosses a line.
template <class T>
SK_AVX512 void compress(const T* from, const uint8_t* bits, int64_t span, bool sparse, T* to) {
    for (int64_t i = 0; i < span; i += 64) {
        uint64_t word = bits_of(bits + i / 8, span - i);
        if (!word) continue;
#pragma GCC unroll 4
        for (int64_t j = i; j < i + 64; j += 16, word >>= 16) {
            const auto which = static_cast<__mmask16>(word);
            const int count = _mm_popcnt_u32(which);
            const __m512i all = j + 16 <= span ? load_all(from + j) : load_some(from + j, which);
            const __m512i taken = _mm512_maskz_compress_epi32(which, all);
            if (sparse && count <= 8) {
                store_half(to, taken);
            } else {
                store_all(to, taken);
            }
            to += count;
        }
    }
}

// The reverse of `n` entries; those whose bit is not set stay as they are.
template <class T>
SK_AVX512 void expand(const T* from, int64_t n, const uint8_t* bits, int64_t span, T* to) {
    for (int64_t i = 0; i < span; i += 64) {
        uint64_t word = bits_of(bits + i / 8, span - i);
        if (!word) continue;
#pragma GCC unroll 4
        for (int64_t j = i; j < i + 64; j += 16, word >>= 16) {
            const auto which = static_cast<__mmask16>(word);
            const int count = _mm_popcnt_u32(which);
            const auto first = static_cast<__mmask16>((1u << count) - 1);
            const __m512i next = n >= 16 ? load_all(from) : load_some(from, first);
            store_some(to + j, which, _mm512_maskz_expand_epi32(which, next));
            n -= count;
            from += count;
        }
    }
}

#else

inline bool has_compress() {
    return false;
}
inline int64_t count_bits(const uint8_t*, int64_t) {
    return 0;
}
template <class T>
void compress(const T*, const uint8_t*, int64_t, bool, T*) {}
template <class T>
void expand(const T*, int64_t, const uint8_t*, int64_t, T*) {}

#endif

}  // namespace sk::subset_adamw
