// Exact GELU and its derivative, and the arguments of the operators that take them.
//
// Φ and gelu' less one half are odd, so each is x P(x²) / Q(x²): minimax fits of this project on
// |x| <= 5.5 and 6.2 (errors 7e-9 and 6e-9), all but one coefficient positive, hence stable in
// float32 (errors 1.7e-7 and 2.5e-7: the roundings). No exponential is taken.
#pragma once

#include "checks.h"
#include "cpu/philox.h"

#include <optional>
#include <type_traits>

#define SK_INLINE inline __attribute__((always_inline))

namespace {

using namespace sk;

SK_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

SK_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

template <int n>
SK_INLINE float polynomial(float u, const float (&c)[n]) {
    float sum = c[n - 1];
#pragma GCC unroll 8
    for (int i = n - 2; i >= 0; --i) sum = sum * u + c[i];
    return sum;
}

constexpr uint32_t kSign = 0x80000000u;

// x/2 + |x| min(1/2, Φ(|x|) - 1/2): the fit passes one half before its argument stops at 5.7, so
// that the tails are exactly x and 0.
SK_INLINE float gelu(float x) {
    constexpr float kP[] = {0.398942232f,    0.0338527672f,   0.00467726868f,
                            0.000168826969f, 6.35213155e-06f, 2.27493402e-08f};
    constexpr float kQ[] = {1.0f,           0.251522213f,    0.028645942f,
                            0.00188445218f, 7.36479415e-05f, 1.19750416e-06f};
    const float size = float_of(bits_of(x) & ~kSign);
    const float z = size < 5.7f ? size : 5.7f, u = z * z;
    const float half = z * polynomial(u, kP) / polynomial(u, kQ);
    return 0.5f * x + size * (half < 0.5f ? half : 0.5f);
}

SK_INLINE float gelu_slope(float x) {
    constexpr float kP[] = {0.797884524f,   -0.018236408f,   0.0136988191f,  0.000277603162f,
                            3.4161978e-05f, 1.12540499e-06f, 1.87351965e-08f};
    constexpr float kQ[] = {1.0f,           0.31047681f,     0.0456628539f,   0.00418569753f,
                            0.00026434302f, 1.12995594e-05f, 3.96432796e-07f, 1.37638512e-09f};
    const float size = float_of(bits_of(x) & ~kSign);
    const float z = size < 6.2f ? size : 6.2f, u = z * z;
    const float half = z * polynomial(u, kP) / polynomial(u, kQ);
    // x · 0 keeps NaN.
    return x * 0.0f + 0.5f + float_of(bits_of(half) | (bits_of(x) & kSign));
}

// That x is a matrix of a dtype that is served.
void check_matrix(const Tensor& x) {
    check_cpu(x, "x");
    check_dim(x, "x", 2);
    check_contiguous(x, "x");
    const bool served =
        x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(served, "x: expected float32 or bfloat16, got ", toString(x.scalar_type()));
}

void check_floats(const Tensor& t, const char* name, int64_t width) {
    check_cpu(t, name);
    check_dtype(t, name, ScalarType::Float);
    check_contiguous(t, name);
    check_numel(t, name, width);
}

void check_like(const Tensor& t, const char* name, const Tensor& x, int64_t numel) {
    check_cpu(t, name);
    check_dtype(t, name, x.scalar_type());
    check_contiguous(t, name);
    check_numel(t, name, numel);
}

const float* floats(const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

// Calls run with a null pointer of the element type.
template <class F>
void by_type(const Tensor& x, const F& run) {
    if (x.scalar_type() == ScalarType::Float)
        run(static_cast<float*>(nullptr));
    else
        run(static_cast<uint16_t*>(nullptr));
}

}  // namespace
