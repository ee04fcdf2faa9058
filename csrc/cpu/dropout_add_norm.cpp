// LayerNorm(residual + dropout(x)), and its backward in one pass over the rows.
#include "cpu/layer_norm.h"

namespace {

using namespace sk;

struct Norm {
    const float *weight, *bias;
    float eps;
};

// Rows [begin, end); `sum` (may be null), `mean` and `rstd` are what backward reads.
template <class T>
SK_INLINE void forward_rows(const T* x, const T* residual, const Norm& norm, const Dropout& dropout,
                            T* y, T* sum, Moments* saved, int64_t width, int64_t begin, int64_t end,
                            Scratch& scratch) {
    float* __restrict z = scratch.first.data();
    const float* __restrict weight = norm.weight, * __restrict bias = norm.bias;
    const uint32_t threshold = dropout.threshold;
    const float scale = dropout.scale;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * width;
        const T* __restrict from = x + first, * __restrict beside = residual + first;
        if (dropout.drops()) {
            const uint16_t* __restrict draws = draw(dropout, first, width, scratch.draws.data());
            for (int64_t j = 0; j < width; ++j)
                z[j] = widen(beside[j]) + (draws[j] < threshold ? widen(from[j]) * scale : 0.0f);
        } else {
            for (int64_t j = 0; j < width; ++j) z[j] = widen(beside[j]) + widen(from[j]);
        }
        if (sum) {
            T* __restrict to = sum + first;
            for (int64_t j = 0; j < width; ++j) narrow(z[j], to + j);
        }
        const Moments m = saved[row] = moments(z, width, norm.eps);
        T* __restrict to = y + first;
        for (int64_t j = 0; j < width; ++j)
            narrow((z[j] - m.mean) * m.rstd * weight[j] + bias[j], to + j);
    }
}

template <class T>
SK_INLINE void backward_rows(const T* dy, const T* sum, const Moments* saved, const float* weight,
                             const Dropout& dropout, T* dx, T* dresidual, float* dweight,
                             int64_t width, int64_t begin, int64_t end, Scratch& scratch) {
    float* __restrict grad = scratch.first.data(), * __restrict z = scratch.second.data();
    const uint32_t threshold = dropout.threshold;
    const float scale = dropout.scale;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * width;
        const T* __restrict from = dy + first, * __restrict before = sum + first;
        for (int64_t j = 0; j < width; ++j) {
            grad[j] = widen(from[j]);
            z[j] = widen(before[j]);
        }
        norm_backward_row(grad, z, saved[row], weight, dweight, dweight ? dweight + width : nullptr,
                          width);
        T* __restrict to = dresidual + first;
        for (int64_t j = 0; j < width; ++j) narrow(z[j], to + j);
        if (dx) {
            const uint16_t* __restrict draws = draw(dropout, first, width, scratch.draws.data());
            T* __restrict masked = dx + first;
            for (int64_t j = 0; j < width; ++j)
                narrow(draws[j] < threshold ? z[j] * scale : 0.0f, masked + j);
        }
    }
}

#define SK_DEFINE(T)                                                                              \
    SK_CLONES void forward(const T* x, const T* residual, const Norm& norm,                       \
                           const Dropout& dropout, T* y, T* sum, Moments* saved, int64_t width,   \
                           int64_t begin, int64_t end, Scratch& scratch) {                        \
        forward_rows(x, residual, norm, dropout, y, sum, saved, width, begin, end, scratch);      \
    }                                                                                             \
    SK_CLONES void backward(const T* dy, const T* sum, const Moments* saved, const float* weight, \
                            const Dropout& dropout, T* dx, T* dresidual, float* dweight,          \
                            int64_t width, int64_t begin, int64_t end, Scratch& scratch) {        \
        backward_rows(dy, sum, saved, weight, dropout, dx, dresidual, dweight, width, begin, end, \
                      scratch);                                                                   \
    }
SK_DEFINE(float)
SK_DEFINE(uint16_t)
#undef SK_DEFINE

// moments: float32 [rows, 2] of mean and 1 / standard deviation.
void dropout_add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                      const Tensor& bias, std::optional<Tensor> seed, int64_t threshold, double eps,
                      Tensor& y, std::optional<Tensor> sum, Tensor& moments) {
    check_dim(x, "x", 2);
    const int64_t rows = x.size(0), width = x.size(1), n = rows * width;
    const Dropout dropout(seed, threshold);
    const Norm norm{data<const float>(weight, "weight", width),
                    data<const float>(bias, "bias", width), static_cast<float>(eps)};
    auto* saved = reinterpret_cast<Moments*>(data<float>(moments, "moments", 2 * rows));
    by_type(x, "x", [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const T *from = data<const T>(x, "x", n), *beside = data<const T>(residual, "residual", n);
        T *to = data<T>(y, "y", n), *keep = data<T>(sum, "sum", n);
        const int64_t each = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
        for_each(ceil_div(rows, each), [&](int64_t task) {
            Scratch scratch(width);
            forward(from, beside, norm, dropout, to, keep, saved, width, task * each,
                    std::min(rows, (task + 1) * each), scratch);
        });
    });
}

// dx is written if a mask lies between it and dresidual; dweight: float32 [2, width], dbias after.
void dropout_add_norm_backward(const Tensor& dy, const Tensor& sum, const Tensor& moments,
                               const Tensor& weight, std::optional<Tensor> seed, int64_t threshold,
                               std::optional<Tensor> dx, Tensor& dresidual,
                               std::optional<Tensor> daffine) {
    check_dim(dy, "dy", 2);
    const int64_t rows = dy.size(0), width = dy.size(1), n = rows * width;
    const Dropout dropout(seed, threshold);
    const float* scale = data<const float>(weight, "weight", width);
    const auto* saved =
        reinterpret_cast<const Moments*>(data<const float>(moments, "moments", 2 * rows));
    float* affine = data<float>(daffine, "daffine", 2 * width);
    const RowChunks chunks(rows);
    const ColumnSums sums(chunks.count, affine ? 2 * width : 0);
    by_type(dy, "dy", [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const T *from = data<const T>(dy, "dy", n), *before = data<const T>(sum, "sum", n);
        T *masked = data<T>(dx, "dx", n), *to = data<T>(dresidual, "dresidual", n);
        for_each(chunks.count, [&](int64_t chunk) {
            Scratch scratch(width);
            backward(from, before, saved, scale, dropout, masked, to,
                     affine ? sums.of(chunk) : nullptr, width, chunks.begin(chunk),
                     chunks.end(chunk), scratch);
        });
    });
    if (affine) sums.add_up(affine);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "dropout_add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed,"
        " int threshold, float eps, Tensor(a!) y, Tensor(b!)? sum, Tensor(c!) moments) -> ()");
    m.def(
        "dropout_add_norm_backward(Tensor dy, Tensor sum, Tensor moments, Tensor weight,"
        " Tensor? seed, int threshold, Tensor(a!)? dx, Tensor(b!) dresidual,"
        " Tensor(c!)? daffine) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("dropout_add_norm", TORCH_BOX(&dropout_add_norm));
    m.impl("dropout_add_norm_backward", TORCH_BOX(&dropout_add_norm_backward));
}
