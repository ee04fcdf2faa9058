// Rotary position embeddings: each pair (x[j], x[half + j]) of a head turned by its token's angle.
#include "checks.h"
#include "cpu/column_sums.h"
#include "cpu/philox.h"

#define SK_INLINE inline __attribute__((always_inline))

namespace {

using namespace sk;

constexpr int64_t kBlock = 16;  // pairs of whole vectors

template <class T>
SK_INLINE void turn(const T* __restrict x1, const T* __restrict x2, const float* __restrict cos,
                    const float* __restrict sin, float sign, T* __restrict y1, T* __restrict y2,
                    int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
        const float a = widen(x1[j]), b = widen(x2[j]), s = sign * sin[j];
        narrow(a * cos[j] - b * s, y1 + j);
        narrow(b * cos[j] + a * s, y2 + j);
    }
}

// The heads of one token, `stride` elements apart in x, side by side in y.
template <class T>
SK_INLINE void turn_heads(const T* x, int64_t stride, const float* cos, const float* sin,
                          float sign, T* y, int64_t heads, int64_t half) {
    for (int64_t h = 0; h < heads; ++h, x += stride, y += 2 * half) {
        int64_t j = 0;
        // A count that the compiler knows: whole vectors, no loop around a few of them.
        for (; j + kBlock <= half; j += kBlock)
            turn(x + j, x + half + j, cos + j, sin + j, sign, y + j, y + half + j, kBlock);
        turn(x + j, x + half + j, cos + j, sin + j, sign, y + j, y + half + j, half - j);
    }
}

SK_CLONES void heads_of(const float* x, int64_t stride, const float* cos, const float* sin,
                        float sign, float* y, int64_t heads, int64_t half) {
    turn_heads(x, stride, cos, sin, sign, y, heads, half);
}

SK_CLONES void heads_of(const uint16_t* x, int64_t stride, const float* cos, const float* sin,
                        float sign, uint16_t* y, int64_t heads, int64_t half) {
    turn_heads(x, stride, cos, sin, sign, y, heads, half);
}

const float* angles(const Tensor& t, const char* name, int64_t tokens, int64_t half) {
    check_cpu(t, name);
    check_dim(t, name, 2);
    check_dtype(t, name, ScalarType::Float);
    check_contiguous(t, name);
    check_size(t, name, 0, tokens);
    check_size(t, name, 1, half);
    return static_cast<const float*>(t.data_ptr());
}

template <class T>
void run(const Tensor& x, const float* cos, const float* sin, float sign, Tensor& y) {
    const int64_t tokens = x.size(0), heads = x.size(1), size = x.size(2), half = size / 2;
    const int64_t across = x.stride(0), stride = x.stride(1);
    const T* const from = static_cast<const T*>(x.data_ptr());
    T* const to = static_cast<T*>(y.data_ptr());
    const int64_t each = std::max<int64_t>(1, 16384 / (heads * size));
    for_each(ceil_div(tokens, each), [&](int64_t task) {
        for (int64_t t = task * each, end = std::min(tokens, t + each); t < end; ++t)
            heads_of(from + t * across, stride, cos + t * half, sin + t * half, sign,
                     to + t * heads * size, heads, half);
    });
}

void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse, Tensor& y) {
    check_cpu(x, "x");
    check_dim(x, "x", 3);
    const int64_t tokens = x.size(0), size = x.size(2);
    STD_TORCH_CHECK(size % 2 == 0, "x: expected an even size in dimension 2, got ", size);
    STD_TORCH_CHECK(x.stride(2) == 1 || x.numel() == 0, "x: expected a unit last stride");
    const float *const c = angles(cos, "cos", tokens, size / 2), *const s = angles(
                                                                     sin, "sin", tokens, size / 2);
    const bool single = x.scalar_type() == ScalarType::Float;
    if (!single) check_dtype(x, "x", ScalarType::BFloat16);
    check_cpu(y, "y");
    check_dtype(y, "y", x.scalar_type());
    check_contiguous(y, "y");
    check_numel(y, "y", x.numel());
    if (x.numel() == 0) return;
    (single ? run<float> : run<uint16_t>)(x, c, s, inverse ? -1.0f : 1.0f, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("rotary", TORCH_BOX(&rotary));
}
