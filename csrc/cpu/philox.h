// Philox4x32-10 (Salmon et al., SC 2011) and the two activation types it is applied to.
#pragma once

#include <cstdint>
#include <cstring>

namespace sk {

constexpr int kPhiloxLanes = 16;

inline __attribute__((always_inline)) float widen(float x) {
    return x;
}

inline __attribute__((always_inline)) float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline __attribute__((always_inline)) void narrow(float x, float* y) {
    *y = x;
}

inline __attribute__((always_inline)) void narrow(float x, uint16_t* y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *y = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : rounded);
}

// Eight words, each in the low half of 64 bits: what one instruction multiplies. High halves are
// whatever is left of a product.
typedef uint64_t PhiloxWords __attribute__((vector_size(64)));

inline __attribute__((always_inline)) void philox_round(PhiloxWords w[4], uint32_t k0,
                                                        uint32_t k1) {
    const PhiloxWords a = (w[0] & 0xffffffffu) * uint64_t{0xD2511F53};
    const PhiloxWords b = (w[2] & 0xffffffffu) * uint64_t{0xCD9E8D57};
    w[0] = (b >> 32) ^ w[1] ^ k0;
    w[2] = (a >> 32) ^ w[3] ^ k1;
    w[1] = b;
    w[3] = a;
}

// out[w][lane]: the four words of sixteen counters from `first`.
inline __attribute__((always_inline)) void philox(uint64_t seed, uint64_t first,
                                                  uint32_t out[4][kPhiloxLanes]) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    const PhiloxWords step = {0, 2, 4, 6, 8, 10, 12, 14};
    const PhiloxWords counters = first + step, next = counters + 1;
    PhiloxWords even[4] = {counters, counters >> 32, {}, {}}, odd[4] = {next, next >> 32, {}, {}};
    for (int round = 0; round < 10; ++round) {
        philox_round(even, k0, k1);
        philox_round(odd, k0, k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w) {
        const PhiloxWords both = (even[w] & 0xffffffffu) | odd[w] << 32;
        std::memcpy(out[w], &both, sizeof(both));
    }
}

}  // namespace sk
