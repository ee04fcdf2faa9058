// Sixteen floats at a time, by the compiler's vectors.
#pragma once

#include "cpu/floats.h"

// Vectors are passed between functions of one build only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4)));

SK_INLINE Vec load(const float* p) {
    return *reinterpret_cast<const UnalignedVec*>(p);
}
SK_INLINE void store(float* p, const Vec& v) {
    *reinterpret_cast<UnalignedVec*>(p) = v;
}
SK_INLINE Vec magnitude(const Vec& v) {
    return (Vec)((Bits)v & 0x7fffffff);
}

// On magnitudes: the order of the bits is the order of the values, with NaN above infinity.
SK_INLINE Vec larger(const Vec& a, const Vec& b) {
    return (Vec)((Bits)a > (Bits)b ? (Bits)a : (Bits)b);
}

SK_INLINE float larger(float a, float b) {
    int32_t x, y;
    std::memcpy(&x, &a, 4);
    std::memcpy(&y, &b, 4);
    return x > y ? a : b;
}

template <int half>
SK_INLINE Vec exchange(const Vec& v) {
    Bits from;
    for (int i = 0; i < kLanes; ++i) from[i] = i ^ half;
    return __builtin_shuffle(v, from);
}

SK_INLINE float fold(Vec v) {
    v += exchange<8>(v);
    v += exchange<4>(v);
    v += exchange<2>(v);
    v += exchange<1>(v);
    return v[0];
}

SK_INLINE float fold_larger(Vec v) {
    v = larger(v, exchange<8>(v));
    v = larger(v, exchange<4>(v));
    v = larger(v, exchange<2>(v));
    v = larger(v, exchange<1>(v));
    return v[0];
}

}  // namespace
