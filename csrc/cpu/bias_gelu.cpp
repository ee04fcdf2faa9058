// Exact GELU of x + bias; backward takes its derivative and the bias gradient in one pass.
//
// Φ and gelu' less one half are odd, so each is x P(x²) / Q(x²): minimax fits of this project on
// |x| <= 5.5 and 6.2 (errors 7e-9 and 6e-9), all but one coefficient positive, hence stable in
// float32 (errors 1.7e-7 and 2.5e-7: the roundings). No exponential is taken.
#include "checks.h"
#include "cpu/column_sums.h"
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

template <class T>
SK_INLINE void forward_rows(const T* __restrict x, const float* __restrict bias, T* __restrict y,
                            int64_t width, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, x += width, y += width)
        if (bias)
            for (int64_t j = 0; j < width; ++j) narrow(gelu(widen(x[j]) + bias[j]), y + j);
        else
            for (int64_t j = 0; j < width; ++j) narrow(gelu(widen(x[j])), y + j);
}

template <class T>
SK_INLINE float backward_one(const T* dy, float pre, T* dx) {
    const float grad = widen(*dy) * gelu_slope(pre);
    narrow(grad, dx);
    return grad;
}

// Rows of dx = dy gelu'(x + bias), added up in `sum`.
template <class T>
SK_INLINE void backward_rows(const T* __restrict dy, const T* __restrict x,
                             const float* __restrict bias, T* __restrict dx, float* __restrict sum,
                             int64_t width, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, dy += width, x += width, dx += width)
        if (bias && sum)
            for (int64_t j = 0; j < width; ++j)
                sum[j] += backward_one(dy + j, widen(x[j]) + bias[j], dx + j);
        else if (bias)
            for (int64_t j = 0; j < width; ++j) backward_one(dy + j, widen(x[j]) + bias[j], dx + j);
        else
            for (int64_t j = 0; j < width; ++j) backward_one(dy + j, widen(x[j]), dx + j);
}

SK_CLONES void forward(const float* x, const float* bias, float* y, int64_t width, int64_t rows) {
    forward_rows(x, bias, y, width, rows);
}

SK_CLONES void forward(const uint16_t* x, const float* bias, uint16_t* y, int64_t width,
                       int64_t rows) {
    forward_rows(x, bias, y, width, rows);
}

SK_CLONES void backward(const float* dy, const float* x, const float* bias, float* dx, float* sum,
                        int64_t width, int64_t rows) {
    backward_rows(dy, x, bias, dx, sum, width, rows);
}

SK_CLONES void backward(const uint16_t* dy, const uint16_t* x, const float* bias, uint16_t* dx,
                        float* sum, int64_t width, int64_t rows) {
    backward_rows(dy, x, bias, dx, sum, width, rows);
}

// The width of x [rows, width] beside a float32 bias [width].
int64_t check(const Tensor& x, const std::optional<Tensor>& bias) {
    check_cpu(x, "x");
    check_dim(x, "x", 2);
    check_contiguous(x, "x");
    const bool served =
        x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(served, "x: expected float32 or bfloat16, got ", toString(x.scalar_type()));
    if (bias) {
        check_dtype(*bias, "bias", ScalarType::Float);
        check_cpu(*bias, "bias");
        check_contiguous(*bias, "bias");
        check_numel(*bias, "bias", x.size(1));
    }
    return x.size(1);
}

void check_like(const Tensor& t, const char* name, const Tensor& x) {
    check_cpu(t, name);
    check_dtype(t, name, x.scalar_type());
    check_contiguous(t, name);
    check_numel(t, name, x.numel());
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

void bias_gelu(const Tensor& x, std::optional<Tensor> bias, Tensor& y) {
    const int64_t width = check(x, bias), rows = x.size(0);
    check_like(y, "y", x);
    if (x.numel() == 0) return;
    const int64_t each = std::max<int64_t>(1, 16384 / width);
    by_type(x, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        for_each(ceil_div(rows, each), [&](int64_t task) {
            const int64_t begin = task * each, n = std::min(rows - begin, each);
            forward(static_cast<const T*>(x.data_ptr()) + begin * width, floats(bias),
                    static_cast<T*>(y.data_ptr()) + begin * width, width, n);
        });
    });
}

void bias_gelu_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> bias, Tensor& dx,
                        std::optional<Tensor> dbias) {
    const int64_t width = check(x, bias);
    check_like(dy, "dy", x);
    check_like(dx, "dx", x);
    if (dbias) {
        STD_TORCH_CHECK(bias.has_value(), "dbias: expected none without a bias");
        check_cpu(*dbias, "dbias");
        check_dtype(*dbias, "dbias", ScalarType::Float);
        check_contiguous(*dbias, "dbias");
        check_numel(*dbias, "dbias", width);
    }
    const RowChunks chunks(x.size(0));
    const ColumnSums sums(chunks.count, dbias ? width : 0);
    by_type(x, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        for_each(chunks.count, [&](int64_t chunk) {
            const int64_t begin = chunks.begin(chunk), first = begin * width;
            backward(static_cast<const T*>(dy.data_ptr()) + first,
                     static_cast<const T*>(x.data_ptr()) + first, floats(bias),
                     static_cast<T*>(dx.data_ptr()) + first, dbias ? sums.of(chunk) : nullptr,
                     width, chunks.end(chunk) - begin);
        });
    });
    if (dbias) sums.add_up(static_cast<float*>(dbias->data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("bias_gelu(Tensor x, Tensor? bias, Tensor(a!) y) -> ()");
    m.def(
        "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, Tensor(a!) dx, Tensor(b!)? dbias)"
        " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
    m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}
