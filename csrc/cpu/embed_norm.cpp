// Three embeddings, their sum, LayerNorm and dropout; backward gathers the sum again.
#include "cpu/layer_norm.h"

namespace {

using namespace sk;

// One row of each table per token.
template <class T>
struct Lookup {
    const T* tables[3];
    const int64_t* ids[3];

    SK_INLINE void sum(int64_t token, int64_t width, float* __restrict z) const {
        const T* __restrict word = tables[0] + ids[0][token] * width, * __restrict position = tables[1] + ids[1][token] * width, * __restrict kind = tables[2] + ids[2][token] * width;
        for (int64_t j = 0; j < width; ++j)
            z[j] = widen(word[j]) + widen(position[j]) + widen(kind[j]);
    }
};

struct Norm {
    const float *weight, *bias;
    float eps;
};

template <class T>
SK_INLINE void forward_rows(const Lookup<T>& lookup, const Norm& norm, const Dropout& dropout, T* y,
                            Moments* saved, int64_t width, int64_t begin, int64_t end,
                            Scratch& scratch) {
    float* __restrict z = scratch.first.data();
    const float* __restrict weight = norm.weight, * __restrict bias = norm.bias;
    const uint32_t threshold = dropout.threshold;
    const float scale = dropout.scale;
    for (int64_t row = begin; row < end; ++row) {
        lookup.sum(row, width, z);
        const Moments m = saved[row] = moments(z, width, norm.eps);
        T* __restrict to = y + row * width;
        if (!dropout.drops()) {
            for (int64_t j = 0; j < width; ++j)
                narrow((z[j] - m.mean) * m.rstd * weight[j] + bias[j], to + j);
            continue;
        }
        const uint16_t* __restrict draws = draw(dropout, row * width, width, scratch.draws.data());
        for (int64_t j = 0; j < width; ++j) {
            const float normal = (z[j] - m.mean) * m.rstd * weight[j] + bias[j];
            narrow(draws[j] < threshold ? normal * scale : 0.0f, to + j);
        }
    }
}

template <class T>
SK_INLINE void backward_rows(const T* dy, const Lookup<T>& lookup, const Moments* saved,
                             const float* weight, const Dropout& dropout, T* dsum, float* dweight,
                             int64_t width, int64_t begin, int64_t end, Scratch& scratch) {
    float* __restrict grad = scratch.first.data(), * __restrict z = scratch.second.data();
    const uint32_t threshold = dropout.threshold;
    const float scale = dropout.scale;
    for (int64_t row = begin; row < end; ++row) {
        const T* __restrict from = dy + row * width;
        lookup.sum(row, width, z);
        if (dropout.drops()) {
            const uint16_t* __restrict draws =
                draw(dropout, row * width, width, scratch.draws.data());
            for (int64_t j = 0; j < width; ++j)
                grad[j] = draws[j] < threshold ? widen(from[j]) * scale : 0.0f;
        } else {
            for (int64_t j = 0; j < width; ++j) grad[j] = widen(from[j]);
        }
        norm_backward_row(grad, z, saved[row], weight, dweight, dweight ? dweight + width : nullptr,
                          width);
        T* __restrict to = dsum + row * width;
        for (int64_t j = 0; j < width; ++j) narrow(z[j], to + j);
    }
}

#define SK_DEFINE(T)                                                                              \
    SK_CLONES void forward(const Lookup<T>& lookup, const Norm& norm, const Dropout& dropout,     \
                           T* y, Moments* saved, int64_t width, int64_t begin, int64_t end,       \
                           Scratch& scratch) {                                                    \
        forward_rows(lookup, norm, dropout, y, saved, width, begin, end, scratch);                \
    }                                                                                             \
    SK_CLONES void backward(const T* dy, const Lookup<T>& lookup, const Moments* saved,           \
                            const float* weight, const Dropout& dropout, T* dsum, float* dweight, \
                            int64_t width, int64_t begin, int64_t end, Scratch& scratch) {        \
        backward_rows(dy, lookup, saved, weight, dropout, dsum, dweight, width, begin, end,       \
                      scratch);                                                                   \
    }
SK_DEFINE(float)
SK_DEFINE(uint16_t)
#undef SK_DEFINE

template <class T>
Lookup<T> lookup_of(const Tensor* ids, const Tensor* tables, int64_t tokens, int64_t width) {
    Lookup<T> out;
    for (int i = 0; i < 3; ++i) {
        check_dim(tables[i], "table", 2);
        check_size(tables[i], "table", 1, width);
        const int64_t count = tables[i].size(0);
        out.tables[i] = data<const T>(tables[i], "table", count * width);
        out.ids[i] = data<const int64_t>(ids[i], "ids", tokens);
        check_index(out.ids[i], tokens, "ids", 0, count);
    }
    return out;
}

void embed_norm(const Tensor& id0, const Tensor& id1, const Tensor& id2, const Tensor& table0,
                const Tensor& table1, const Tensor& table2, const Tensor& weight,
                const Tensor& bias, std::optional<Tensor> seed, int64_t threshold, double eps,
                Tensor& y, Tensor& moments) {
    const int64_t rows = id0.numel(), width = weight.numel(), n = rows * width;
    const Tensor ids[] = {id0, id1, id2}, tables[] = {table0, table1, table2};
    const Dropout dropout(seed, threshold);
    const Norm norm{data<const float>(weight, "weight", width),
                    data<const float>(bias, "bias", width), static_cast<float>(eps)};
    auto* saved = reinterpret_cast<Moments*>(data<float>(moments, "moments", 2 * rows));
    by_type(y, "y", [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const Lookup<T> lookup = lookup_of<T>(ids, tables, rows, width);
        T* to = data<T>(y, "y", n);
        const int64_t each = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
        for_each(ceil_div(rows, each), [&](int64_t task) {
            Scratch scratch(width);
            forward(lookup, norm, dropout, to, saved, width, task * each,
                    std::min(rows, (task + 1) * each), scratch);
        });
    });
}

void embed_norm_backward(const Tensor& dy, const Tensor& id0, const Tensor& id1, const Tensor& id2,
                         const Tensor& table0, const Tensor& table1, const Tensor& table2,
                         const Tensor& moments, const Tensor& weight, std::optional<Tensor> seed,
                         int64_t threshold, Tensor& dsum, std::optional<Tensor> daffine) {
    const int64_t rows = id0.numel(), width = weight.numel(), n = rows * width;
    const Tensor ids[] = {id0, id1, id2}, tables[] = {table0, table1, table2};
    const Dropout dropout(seed, threshold);
    const float* scale = data<const float>(weight, "weight", width);
    const auto* saved =
        reinterpret_cast<const Moments*>(data<const float>(moments, "moments", 2 * rows));
    float* affine = data<float>(daffine, "daffine", 2 * width);
    const RowChunks chunks(rows);
    const ColumnSums sums(chunks.count, affine ? 2 * width : 0);
    by_type(dy, "dy", [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const Lookup<T> lookup = lookup_of<T>(ids, tables, rows, width);
        const T* from = data<const T>(dy, "dy", n);
        T* to = data<T>(dsum, "dsum", n);
        for_each(chunks.count, [&](int64_t chunk) {
            Scratch scratch(width);
            backward(from, lookup, saved, scale, dropout, to, affine ? sums.of(chunk) : nullptr,
                     width, chunks.begin(chunk), chunks.end(chunk), scratch);
        });
    });
    if (affine) sums.add_up(affine);
}

// Columns [first, first + n) of the rows, each added to row index[t] of sums, `stride` apart.
template <class T>
SK_INLINE void add_strip(const T* rows, const int64_t* index, int64_t tokens, int64_t width,
                         int64_t n, float* sums, int64_t stride) {
    for (int64_t t = 0; t < tokens; ++t) {
        const T* __restrict from = rows + t * width;
        float* __restrict to = sums + index[t] * stride;
        for (int64_t j = 0; j < n; ++j) to[j] += widen(from[j]);
    }
}

SK_CLONES void add(const float* rows, const int64_t* index, int64_t tokens, int64_t width,
                   int64_t n, float* sums, int64_t stride) {
    add_strip(rows, index, tokens, width, n, sums, stride);
}

SK_CLONES void add(const uint16_t* rows, const int64_t* index, int64_t tokens, int64_t width,
                   int64_t n, float* sums, int64_t stride) {
    add_strip(rows, index, tokens, width, n, sums, stride);
}

// Row r of out = the rows whose index is r, in order: a task owns a strip of columns. `out` is
// zero.
void add_rows(const Tensor& rows, const Tensor& index, Tensor& out) {
    check_dim(rows, "rows", 2);
    check_dim(out, "out", 2);
    check_size(out, "out", 1, rows.size(1));
    const int64_t tokens = rows.size(0), width = rows.size(1), count = out.size(0);
    const int64_t* id = data<const int64_t>(index, "index", tokens);
    check_index(id, tokens, "index", 0, count);
    constexpr int64_t kStrip = 64;
    by_type(rows, "rows", [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        const T* from = data<const T>(rows, "rows", tokens * width);
        T* to = data<T>(out, "out", count * width);
        for_each(ceil_div(width, kStrip), [&](int64_t strip) {
            const int64_t first = strip * kStrip, n = std::min(kStrip, width - first);
            if constexpr (std::is_same_v<T, float>) {
                add(from + first, id, tokens, width, n, to + first, width);
            } else {
                std::vector<float> sums(count * n);
                add(from + first, id, tokens, width, n, sums.data(), n);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < n; ++j)
                        narrow(sums[r * n + j], to + r * width + first + j);
            }
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "embed_norm(Tensor id0, Tensor id1, Tensor id2, Tensor table0, Tensor table1,"
        " Tensor table2, Tensor weight, Tensor bias, Tensor? seed, int threshold, float eps,"
        " Tensor(a!) y, Tensor(b!) moments) -> ()");
    m.def(
        "embed_norm_backward(Tensor dy, Tensor id0, Tensor id1, Tensor id2, Tensor table0,"
        " Tensor table1, Tensor table2, Tensor moments, Tensor weight, Tensor? seed,"
        " int threshold, Tensor(a!) dsum, Tensor(b!)? daffine) -> ()");
    m.def("add_rows(Tensor rows, Tensor index, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("embed_norm", TORCH_BOX(&embed_norm));
    m.impl("embed_norm_backward", TORCH_BOX(&embed_norm_backward));
    m.impl("add_rows", TORCH_BOX(&add_rows));
}
