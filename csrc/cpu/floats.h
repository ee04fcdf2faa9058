// Reading float32, bfloat16 and float16 as float32, a tile at a time.
#pragma once

#include <cstdint>
#include <cstring>

#define SK_INLINE inline __attribute__((always_inline))

namespace sk {

enum Type : int64_t { kFloat, kBFloat16, kHalf };

SK_INLINE float half_to_float(uint16_t h) {
    const uint32_t body = static_cast<uint32_t>(h & 0x7fff) << 13;
    uint32_t shifted = body + (113u << 23), base = 113u << 23, small;
    float a, b;
    std::memcpy(&a, &shifted, 4);
    std::memcpy(&b, &base, 4);
    a -= b;  // subnormal halves
    std::memcpy(&small, &a, 4);
    const uint32_t large = body >= (31u << 23) ? body | 0x7f800000u : body + (112u << 23);
    uint32_t bits = body < (1u << 23) ? small : large;
    bits |= static_cast<uint32_t>(h & 0x8000) << 16;
    std::memcpy(&a, &bits, 4);
    return a;
}

// float32 at `first` elements from `base`: in place, or converted into `scratch`.
SK_INLINE const float* as_float(const void* base, int64_t type, int64_t first, int64_t n,
                                float* __restrict scratch) {
    if (type == kFloat) return static_cast<const float*>(base) + first;
    const uint16_t* source = static_cast<const uint16_t*>(base) + first;
    if (type == kBFloat16) {
        uint32_t* bits = reinterpret_cast<uint32_t*>(scratch);
        for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(source[i]) << 16;
    } else {
        for (int64_t i = 0; i < n; ++i) scratch[i] = half_to_float(source[i]);
    }
    return scratch;
}

}  // namespace sk
