// e^x by the compiler's vectors.
#pragma once

#include "cpu/lanes.h"

namespace {

// e^x for x <= 88, 0 below -87: x = n ln 2 + r, Taylor to r^7 (remainder 5e-9 of it, |r| <= 0.35).
SK_INLINE Vec exponential(Vec x) {
    const Bits lost = x < -87.0f;  // a NaN is not
    x = lost ? Vec{} - 87.0f : x;
    const float rounder = 12582912.0f;  // 1.5 * 2^23
    const Vec n = (x * 1.44269504f + rounder) - rounder;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec y = r * (1.0f / 5040) + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return (Vec)(((Bits)y + (__builtin_convertvector(n, Bits) << 23)) & ~lost);
}

}  // namespace
