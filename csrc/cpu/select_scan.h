// One pass over scores: bits of what is above a bracket, a list of what is inside it.
#pragma once

#include "cpu/floats.h"

#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace sk;

enum Score : int64_t { kValue, kAbsValue, kAbsWG, kGradSquared, kScores };

constexpr int64_t kTile = 512;  // entries scored at a time; a multiple of 64

struct Source {
    const void *value, *grad;
    int64_t value_type, grad_type, numel;
    uint8_t* bits;
};

// Keys order as scores do: NaN is 0, then -inf, ..., -0 = +0, ..., +inf.
SK_INLINE uint32_t key_of(float score) {
    score += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0 : key;
}

SK_INLINE float score_of(uint32_t key) {
    const uint32_t bits = key == 0 ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
}

struct Scratch {
    alignas(64) float value[kTile], grad[kTile], score[kTile];
};

SK_INLINE int64_t bytes_of(int64_t type) {
    return type == kFloat ? 4 : 2;
}

// Scores of n <= kTile entries from `first`: in place for plain float32 values.
SK_INLINE const float* score_tile(const Source& s, int64_t score, int64_t first, int64_t n,
                                  Scratch& scratch) {
    const float* v = as_float(s.value, s.value_type, first, n, scratch.value);
    if (score == kValue) return v;
    const float* g = score == kAbsValue ? v : as_float(s.grad, s.grad_type, first, n, scratch.grad);
    float* __restrict out = scratch.score;
    if (score == kAbsValue)
        for (int64_t i = 0; i < n; ++i) out[i] = __builtin_fabsf(v[i]);
    else if (score == kAbsWG)
        for (int64_t i = 0; i < n; ++i) out[i] = __builtin_fabsf(v[i] * g[i]);
    else
        for (int64_t i = 0; i < n; ++i) out[i] = g[i] * g[i];
    return out;
}

struct Piece {
    const Source* source;
    int64_t first, n;
};

// Asks for huge pages: the first touch of 4 KiB costs more than reading 40.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
    constexpr uintptr_t kHuge = 1 << 21;
    const uintptr_t first = ((uintptr_t)begin + kHuge - 1) / kHuge * kHuge;
    const uintptr_t last = ((uintptr_t)begin + bytes) / kHuge * kHuge;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
}

// Entries inside the bracket, as one thread met them; pages are touched as they are needed.
struct Inside {
    std::unique_ptr<uint32_t[]> bits, at;  // of the score; within the piece
    int64_t size = 0, capacity = 0;

    void reserve(int64_t wanted) {
        size = 0;
        if (wanted <= capacity) return;
        for (auto* list : {&bits, &at}) {
            list->reset(new uint32_t[wanted]);
            prefer_huge_pages(list->get(), wanted * 4);
        }
        capacity = wanted;
    }
};

struct Found {
    int thread = 0;
    int64_t begin = 0, count = 0, above = 0, ties = 0;
};

struct Bracket {
    float low, high;
};

// The end of a thread's list, in registers: beside it lies another thread's.
struct Cursor {
    uint32_t *bits, *at;
};

struct Portable {
    static void compare(const float* s, Bracket b, uint64_t& above, uint64_t& inside) {
        above = inside = 0;
        for (int i = 0; i < 64; ++i) {
            above |= (uint64_t)(s[i] > b.high) << i;
            inside |= (uint64_t)((s[i] >= b.low) & !(s[i] > b.high)) << i;
        }
    }
    static Cursor append(Cursor to, const float* s, uint64_t which, int64_t at) {
        for (; which; which &= which - 1) {
            const int bit = __builtin_ctzll(which);
            std::memcpy(to.bits++, s + bit, 4);
            *to.at++ = (uint32_t)(at + bit);
        }
        return to;
    }
};

#if defined(__x86_64__)
#define SK_WIDE __attribute__((target("arch=x86-64-v4")))
struct Wide {
    SK_WIDE static void compare(const float* s, Bracket b, uint64_t& above, uint64_t& inside) {
        const __m512 low = _mm512_set1_ps(b.low), high = _mm512_set1_ps(b.high);
        above = inside = 0;
        for (int q = 0; q < 4; ++q) {
            const __m512 v = _mm512_loadu_ps(s + 16 * q);
            const uint64_t over = _mm512_cmp_ps_mask(v, high, _CMP_GT_OQ);
            const uint64_t from = _mm512_cmp_ps_mask(v, low, _CMP_GE_OQ);
            above |= over << 16 * q;
            inside |= (from & ~over) << 16 * q;
        }
    }
    // Without a branch: whether 64 entries hold one inside the bracket is a coin toss.
    SK_WIDE static Cursor append(Cursor to, const float* s, uint64_t which, int64_t at) {
        const __m512i lane =
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int q = 0; q < 4; ++q) {
            const __mmask16 mask = (__mmask16)(which >> 16 * q);
            const __m512i v = _mm512_castps_si512(_mm512_loadu_ps(s + 16 * q));
            const __m512i here = _mm512_add_epi32(lane, _mm512_set1_epi32((int)at + 16 * q));
            _mm512_storeu_si512(to.bits, _mm512_maskz_compress_epi32(mask, v));
            _mm512_storeu_si512(to.at, _mm512_maskz_compress_epi32(mask, here));
            const int found = __builtin_popcount(mask);
            to.bits += found;
            to.at += found;
        }
        return to;
    }
};
#endif

// Sets the bits above the bracket and lists what is inside it.
template <class Compare>
SK_INLINE void scan(const Piece& piece, int64_t score, Bracket bracket, Inside& inside,
                    Found& found) {
    const Source& source = *piece.source;
    Scratch scratch;
    found.begin = inside.size;
    Cursor end{&inside.bits[inside.size], &inside.at[inside.size]};
    int64_t total = 0;
    for (int64_t i = 0; i < piece.n; i += kTile) {
        const int64_t n = std::min(kTile, piece.n - i);
        const float* scores = score_tile(source, score, piece.first + i, n, scratch);
        uint8_t* bits = source.bits + (piece.first + i) / 8;
        float tail[64];
        for (int64_t j = 0; j < n; j += 64) {
            const float* group = scores + j;
            if (n - j < 64) {
                std::fill(tail, tail + 64, std::numeric_limits<float>::quiet_NaN());
                std::copy(group, scores + n, tail);
                group = tail;
            }
            uint64_t above, within;
            Compare::compare(group, bracket, above, within);
            std::memcpy(bits + j / 8, &above, (std::min<int64_t>(64, n - j) + 7) / 8);
            total += __builtin_popcountll(above);
            end = Compare::append(end, group, within, i + j);
        }
    }
    found.above = total;
    inside.size = end.bits - inside.bits.get();
    found.count = inside.size - found.begin;
}

using ScanFn = void (*)(const Piece&, int64_t, Bracket, Inside&, Found&);

void scan_portable(const Piece& p, int64_t score, Bracket b, Inside& inside, Found& found) {
    scan<Portable>(p, score, b, inside, found);
}

#if defined(__x86_64__)
SK_WIDE void scan_wide(const Piece& p, int64_t score, Bracket b, Inside& inside, Found& found) {
    scan<Wide>(p, score, b, inside, found);
}
#endif

ScanFn best_scan() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return scan_wide;
#endif
    return scan_portable;
}

}  // namespace
