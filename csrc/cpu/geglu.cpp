// gelu(a) times b of the two halves of x + bias; backward takes both gradients in one pass.
#include "cpu/column_sums.h"
#include "cpu/gelu.h"

namespace {

template <class T>
SK_INLINE void forward_rows(const T* x, const float* __restrict bias, T* __restrict y, int64_t n,
                            int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, x += 2 * n, y += n) {
        const T* __restrict a = x, * __restrict b = x + n;
        if (bias)
            for (int64_t j = 0; j < n; ++j)
                narrow(gelu(widen(a[j]) + bias[j]) * (widen(b[j]) + bias[n + j]), y + j);
        else
            for (int64_t j = 0; j < n; ++j) narrow(gelu(widen(a[j])) * widen(b[j]), y + j);
    }
}

// da and db of one element; returned in float32.
template <class T>
SK_INLINE void backward_one(float dy, float a, float b, T* da, T* db, float& slope, float& gate) {
    slope = dy * b * gelu_slope(a);
    gate = dy * gelu(a);
    narrow(slope, da);
    narrow(gate, db);
}

// Rows of dx, added up in `sum`.
template <class T>
SK_INLINE void backward_rows(const T* __restrict dy, const T* x, const float* __restrict bias,
                             T* dx, float* sum, int64_t n, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, dy += n, x += 2 * n, dx += 2 * n) {
        const T* __restrict a = x, * __restrict b = x + n;
        T* __restrict da = dx, * __restrict db = dx + n;
        float first, second;
        if (!bias) {
            for (int64_t j = 0; j < n; ++j)
                backward_one(widen(dy[j]), widen(a[j]), widen(b[j]), da + j, db + j, first, second);
        } else if (!sum) {
            for (int64_t j = 0; j < n; ++j)
                backward_one(widen(dy[j]), widen(a[j]) + bias[j], widen(b[j]) + bias[n + j], da + j,
                             db + j, first, second);
        } else {
            float* __restrict suma = sum, * __restrict sumb = sum + n;
            for (int64_t j = 0; j < n; ++j) {
                backward_one(widen(dy[j]), widen(a[j]) + bias[j], widen(b[j]) + bias[n + j], da + j,
                             db + j, first, second);
                suma[j] += first;
                sumb[j] += second;
            }
        }
    }
}

SK_CLONES void forward(const float* x, const float* bias, float* y, int64_t n, int64_t rows) {
    forward_rows(x, bias, y, n, rows);
}

SK_CLONES void forward(const uint16_t* x, const float* bias, uint16_t* y, int64_t n, int64_t rows) {
    forward_rows(x, bias, y, n, rows);
}

SK_CLONES void backward(const float* dy, const float* x, const float* bias, float* dx, float* sum,
                        int64_t n, int64_t rows) {
    backward_rows(dy, x, bias, dx, sum, n, rows);
}

SK_CLONES void backward(const uint16_t* dy, const uint16_t* x, const float* bias, uint16_t* dx,
                        float* sum, int64_t n, int64_t rows) {
    backward_rows(dy, x, bias, dx, sum, n, rows);
}

// n of x [rows, 2 n] beside a float32 bias [2 n].
int64_t check(const Tensor& x, const std::optional<Tensor>& bias) {
    check_matrix(x);
    STD_TORCH_CHECK(x.size(1) % 2 == 0, "x: expected an even size in dimension 1, got ", x.size(1));
    if (bias) check_floats(*bias, "bias", x.size(1));
    return x.size(1) / 2;
}

void geglu(const Tensor& x, std::optional<Tensor> bias, Tensor& y) {
    const int64_t n = check(x, bias), rows = x.size(0);
    check_like(y, "y", x, rows * n);
    if (x.numel() == 0) return;
    const int64_t each = std::max<int64_t>(1, 16384 / n);
    by_type(x, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        for_each(ceil_div(rows, each), [&](int64_t task) {
            const int64_t begin = task * each;
            forward(static_cast<const T*>(x.data_ptr()) + begin * 2 * n, floats(bias),
                    static_cast<T*>(y.data_ptr()) + begin * n, n, std::min(rows - begin, each));
        });
    });
}

void geglu_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> bias, Tensor& dx,
                    std::optional<Tensor> dbias) {
    const int64_t n = check(x, bias);
    check_like(dy, "dy", x, x.size(0) * n);
    check_like(dx, "dx", x, x.numel());
    if (dbias) {
        STD_TORCH_CHECK(bias.has_value(), "dbias: expected none without a bias");
        check_floats(*dbias, "dbias", 2 * n);
    }
    const RowChunks chunks(x.size(0));
    const ColumnSums sums(chunks.count, dbias ? 2 * n : 0);
    by_type(x, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        for_each(chunks.count, [&](int64_t chunk) {
            const int64_t begin = chunks.begin(chunk), first = begin * n;
            backward(static_cast<const T*>(dy.data_ptr()) + first,
                     static_cast<const T*>(x.data_ptr()) + 2 * first, floats(bias),
                     static_cast<T*>(dx.data_ptr()) + 2 * first, dbias ? sums.of(chunk) : nullptr,
                     n, chunks.end(chunk) - begin);
        });
    });
    if (dbias) sums.add_up(static_cast<float*>(dbias->data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("geglu(Tensor x, Tensor? bias, Tensor(a!) y) -> ()");
    m.def(
        "geglu_backward(Tensor dy, Tensor x, Tensor? bias, Tensor(a!) dx, Tensor(b!)? dbias)"
        " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("geglu", TORCH_BOX(&geglu));
    m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}
