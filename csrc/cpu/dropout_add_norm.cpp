// LayerNorm(residual + dropout(x)), and its backward in one pass over the rows.
#include "cpu/layer_norm.h"

namespace {

using namespace sk;

struct Norm {
    const float *weight, *bias;
    float eps;
};

// The rows after these are fetched meanwhile: a few rows at once are no stream the processor sees.
template <class T>
SK_INLINE void ahead(const T* p, int64_t n) {
    __builtin_prefetch(p + n, 0, 2);
}

// What forward reads and writes; `sum` may be null.
template <class T>
struct Forward {
    const T *x, *residual;
    Norm norm;
    Dropout dropout;
    T *y, *sum;
    Moments* saved;
    int64_t width;

    // Rows from `row`.
    template <int R>
    SK_INLINE void rows(int64_t row, const Scratch& scratch) const {
        const int64_t n = width, first = row * n;
        const T *from = x + first, *beside = residual + first;
        T *to = y + first, *keep = sum ? sum + first : nullptr;
        float* z = scratch.first.data();
        const bool drops = dropout.drops();
        const uint16_t* draws = drops ? draw(dropout, first, R * n, scratch.draws.data()) : nullptr;
        Sum sums[R];
        by_lanes(n, [&](int64_t j, auto lane) SK_LAMBDA {
            using V = decltype(lane);
            SK_ROWS {
                const int64_t i = r * n + j;
                ahead(from + i, R * n);
                ahead(beside + i, R * n);
                V v = read<V>(from + i);
                if (drops) v = kept(v, draws + i, dropout);
                v += read<V>(beside + i);
                write(v, z + i);
                if (keep) write(v, keep + i);
                sums[r].add(v);
            }
        });
        Moments* m = saved + row;
        moments<R>(z, sums, n, norm.eps, m);
        by_lanes(n, [&](int64_t j, auto lane) SK_LAMBDA {
            using V = decltype(lane);
            const V w = read<V>(norm.weight + j), b = read<V>(norm.bias + j);
            SK_ROWS {
                const int64_t i = r * n + j;
                write((read<V>(z + i) - m[r].mean) * m[r].rstd * w + b, to + i);
            }
        });
    }
};

// What backward reads and writes. The normalised row is (sum - mean) rstd or, where `shift` is
// given, (y - shift) inverse: bias and 1 / weight. `dx` and `dweight` (dbias after it) may be null.
template <class T>
struct Backward {
    const T *dy, *before;
    const Moments* saved;
    const float *weight, *shift, *inverse;
    Dropout dropout;
    T *dx, *dresidual;
    int64_t width;

    template <int R>
    SK_INLINE void rows(int64_t row, float* dweight, const Scratch& scratch) const {
        const int64_t n = width;
        if (shift) {
            const T* y = before + row * n;
            rows_of<R>(
                row,
                [&](int64_t j, auto lane) SK_LAMBDA {
                    using V = decltype(lane);
                    const V b = read<V>(shift + j), by = read<V>(inverse + j);
                    return [=](int r) SK_LAMBDA { return (read<V>(y + r * n + j) - b) * by; };
                },
                dweight, scratch);
        } else {
            const T* z = before + row * n;
            float mean[R], rstd[R];
            SK_ROWS {
                mean[r] = saved[row + r].mean;
                rstd[r] = saved[row + r].rstd;
            }
            rows_of<R>(
                row,
                [&](int64_t j, auto lane) SK_LAMBDA {
                    return [&, j](int r) SK_LAMBDA {
                        return (read<decltype(lane)>(z + r * n + j) - mean[r]) * rstd[r];
                    };
                },
                dweight, scratch);
        }
    }

  private:
    template <int R, class Normal>
    SK_INLINE void rows_of(int64_t row, const Normal& normal, float* dweight,
                           const Scratch& scratch) const {
        const int64_t n = width, first = row * n;
        const T *from = dy + first, *beside = before + first;
        T *to = dresidual + first, *masked = dx ? dx + first : nullptr;
        const uint16_t* draws = dx ? draw(dropout, first, R * n, scratch.draws.data()) : nullptr;
        norm_backward_rows<R>([&](int r, int64_t j, auto lane)
                                  SK_LAMBDA { return read<decltype(lane)>(from + r * n + j); },
                              normal,
                              [&](int r, int64_t j, const auto& dz) SK_LAMBDA {
                                  const int64_t i = r * n + j;
                                  ahead(from + i, R * n);
                                  ahead(beside + i, R * n);
                                  write(dz, to + i);
                                  if (masked) write(kept(dz, draws + i, dropout), masked + i);
                              },
                              saved + row, weight, dweight, dweight ? dweight + n : nullptr, n);
    }
};

#define SK_DEFINE(T)                                                                        \
    SK_CLONES void run(const Forward<T>& f, int64_t begin, int64_t end, const Scratch& s) { \
        for (; begin + kRows <= end; begin += kRows) f.rows<kRows>(begin, s);               \
        for (; begin < end; ++begin) f.rows<1>(begin, s);                                   \
    }                                                                                       \
    SK_CLONES void run(const Backward<T>& b, int64_t begin, int64_t end, float* dweight,    \
                       const Scratch& s) {                                                  \
        for (; begin + kRows <= end; begin += kRows) b.rows<kRows>(begin, dweight, s);      \
        for (; begin < end; ++begin) b.rows<1>(begin, dweight, s);                          \
    }
SK_DEFINE(float)
SK_DEFINE(uint16_t)
#undef SK_DEFINE

// Whether backward can take the normalised row from y: a rounding of y moves (y - bias) / weight by
// at most 1 + |bias / weight| of its own, and nothing may underflow. False for NaN.
SK_CLONES bool recovers(const float* weight, const float* bias, int64_t n) {
    bool all = true;
    for (int64_t j = 0; j < n; ++j) {
        const float size = std::fabs(weight[j]);
        all &= std::fabs(bias[j]) <= 2.0f * size && size >= 0x1p-64f && size <= 0x1p64f;
    }
    return all;
}

int64_t dropout_add_norm_recovers(const Tensor& weight, const Tensor& bias) {
    const int64_t n = weight.numel();
    return recovers(data<const float>(weight, "weight", n), data<const float>(bias, "bias", n), n);
}

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
        const Forward<T> forward{data<const T>(x, "x", n),
                                 data<const T>(residual, "residual", n),
                                 norm,
                                 dropout,
                                 data<T>(y, "y", n),
                                 data<T>(sum, "sum", n),
                                 saved,
                                 width};
        const int64_t each =
            ceil_div(std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), kRows) * kRows;
        for_each(ceil_div(rows, each), [&](int64_t task) {
            const Scratch scratch(kRows * width);
            run(forward, task * each, std::min(rows, (task + 1) * each), scratch);
        });
    });
}

// dx is written if a mask lies between it and dresidual; dweight: float32 [2, width], dbias after.
// `before` is the sum or, where the bias is given, y.
void dropout_add_norm_backward(const Tensor& dy, const Tensor& before, const Tensor& moments,
                               const Tensor& weight, std::optional<Tensor> bias,
                               std::optional<Tensor> seed, int64_t threshold,
                               std::optional<Tensor> dx, Tensor& dresidual,
                               std::optional<Tensor> daffine) {
    check_dim(dy, "dy", 2);
    const int64_t rows = dy.size(0), width = dy.size(1), n = rows * width;
    const Dropout dropout(seed, threshold);
    const float *scale = data<const float>(weight, "weight", width),
                *shift = data<const float>(bias, "bias", width);
    const Buffer<float> inverse(shift ? width : 0);
    for (int64_t j = 0; shift && j < width; ++j) inverse.data()[j] = 1.0f / scale[j];
    const auto* saved =
        reinterpret_cast<const Moments*>(data<const float>(moments, "moments", 2 * rows));
    float* affine = data<float>(daffine, "daffine", 2 * width);
    const RowChunks chunks(rows);
    const ColumnSums sums(chunks.count, affine ? 2 * width : 0);
    by_type(dy, "dy", [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const Backward<T> backward{data<const T>(dy, "dy", n),
                                   data<const T>(before, "before", n),
                                   saved,
                                   scale,
                                   shift,
                                   inverse.data(),
                                   dropout,
                                   data<T>(dx, "dx", n),
                                   data<T>(dresidual, "dresidual", n),
                                   width};
        for_each(chunks.count, [&](int64_t chunk) {
            const Scratch scratch(backward.dx ? kRows * width : 0);
            run(backward, chunks.begin(chunk), chunks.end(chunk), affine ? sums.of(chunk) : nullptr,
                scratch);
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
        "dropout_add_norm_backward(Tensor dy, Tensor before, Tensor moments, Tensor weight,"
        " Tensor? bias, Tensor? seed, int threshold, Tensor(a!)? dx, Tensor(b!) dresidual,"
        " Tensor(c!)? daffine) -> ()");
    m.def("dropout_add_norm_recovers(Tensor weight, Tensor bias) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("dropout_add_norm", TORCH_BOX(&dropout_add_norm));
    m.impl("dropout_add_norm_backward", TORCH_BOX(&dropout_add_norm_backward));
    m.impl("dropout_add_norm_recovers", TORCH_BOX(&dropout_add_norm_recovers));
}
