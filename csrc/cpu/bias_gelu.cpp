// Exact GELU of x + bias; backward takes its derivative and the bias gradient in one pass.
#include "cpu/column_sums.h"
#include "cpu/gelu.h"

namespace {

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
    check_matrix(x);
    if (bias) check_floats(*bias, "bias", x.size(1));
    return x.size(1);
}

void bias_gelu(const Tensor& x, std::optional<Tensor> bias, Tensor& y) {
    const int64_t width = check(x, bias), rows = x.size(0);
    check_like(y, "y", x, x.numel());
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
    check_like(dy, "dy", x, x.numel());
    check_like(dx, "dx", x, x.numel());
    if (dbias) {
        STD_TORCH_CHECK(bias.has_value(), "dbias: expected none without a bias");
        check_floats(*dbias, "dbias", width);
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
