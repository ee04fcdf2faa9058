// Gather and scatter of feature columns of a matrix, two or four bytes per element.
#include "checks.h"
#include "cpu/empty.h"
#include "parallel.h"

#include <immintrin.h>

#include <cstring>
#include <memory>
#include <optional>

#define SK_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))

namespace {

using sk::ceil_div;
using sk::ScalarType;
using sk::Tensor;

// One bit per column: kept. Ascending indices make a gather a compress, a scatter an expand.
struct ColumnMask {
    std::unique_ptr<uint32_t[]> words;
    int64_t count;

    ColumnMask(const int32_t* index, int64_t n, int64_t width) : count(ceil_div(width, 32)) {
        words.reset(new uint32_t[count]());
        for (int64_t j = 0; j < n; ++j) words[index[j] / 32] |= 1u << (index[j] % 32);
    }
};

SK_VBMI void gather_row(const uint16_t* from, uint16_t* to, const ColumnMask& mask, int64_t width) {
    for (int64_t w = 0; w < mask.count; ++w) {
        const uint32_t bits = mask.words[w];
        if (bits == 0) continue;
        const int n = __builtin_popcount(bits);
        const uint32_t valid = ~0u >> (32 - std::min<int64_t>(32, width - 32 * w));
        const __m512i v = _mm512_maskz_loadu_epi16(valid, from + 32 * w);
        _mm512_mask_storeu_epi16(to, ~0u >> (32 - n), _mm512_maskz_compress_epi16(bits, v));
        to += n;
    }
}

SK_VBMI void gather_row(const uint32_t* from, uint32_t* to, const ColumnMask& mask, int64_t width) {
    for (int64_t h = 0; h < 2 * mask.count; ++h) {
        const __mmask16 bits = mask.words[h / 2] >> (h % 2 * 16);
        if (bits == 0) continue;
        const int n = __builtin_popcount(bits);
        const __mmask16 valid = 0xffffu >> (16 - std::min<int64_t>(16, width - 16 * h));
        const __m512i v = _mm512_maskz_loadu_epi32(valid, from + 16 * h);
        _mm512_mask_storeu_epi32(to, 0xffffu >> (16 - n), _mm512_maskz_compress_epi32(bits, v));
        to += n;
    }
}

SK_VBMI void scatter_row(const uint16_t* from, const uint16_t* fill, uint16_t* to,
                         const ColumnMask& mask, int64_t width) {
    for (int64_t w = 0; w < mask.count; ++w) {
        const uint32_t bits = mask.words[w];
        const int n = __builtin_popcount(bits);
        const uint32_t valid = ~0u >> (32 - std::min<int64_t>(32, width - 32 * w));
        const uint32_t first = n ? ~0u >> (32 - n) : 0;
        const __m512i rest =
            fill ? _mm512_maskz_loadu_epi16(valid, fill + 32 * w) : _mm512_setzero_si512();
        const __m512i v = _mm512_maskz_loadu_epi16(first, from);
        _mm512_mask_storeu_epi16(to + 32 * w, valid, _mm512_mask_expand_epi16(rest, bits, v));
        from += n;
    }
}

SK_VBMI void scatter_row(const uint32_t* from, const uint32_t* fill, uint32_t* to,
                         const ColumnMask& mask, int64_t width) {
    for (int64_t h = 0; h * 16 < width; ++h) {
        const __mmask16 bits = mask.words[h / 2] >> (h % 2 * 16);
        const int n = __builtin_popcount(bits);
        const __mmask16 valid = 0xffffu >> (16 - std::min<int64_t>(16, width - 16 * h));
        const __mmask16 first = n ? 0xffffu >> (16 - n) : 0;
        const __m512i rest =
            fill ? _mm512_maskz_loadu_epi32(valid, fill + 16 * h) : _mm512_setzero_si512();
        const __m512i v = _mm512_maskz_loadu_epi32(first, from);
        _mm512_mask_storeu_epi32(to + 16 * h, valid, _mm512_mask_expand_epi32(rest, bits, v));
        from += n;
    }
}

SK_VBMI void add_row(const float* from, const float* bias, float* to, const ColumnMask& mask,
                     int64_t width) {
    for (int64_t h = 0; h * 16 < width; ++h) {
        const __mmask16 bits = mask.words[h / 2] >> (h % 2 * 16);
        const int n = __builtin_popcount(bits);
        const __mmask16 valid = 0xffffu >> (16 - std::min<int64_t>(16, width - 16 * h));
        const __mmask16 first = n ? 0xffffu >> (16 - n) : 0;
        const __m512 rest = _mm512_maskz_loadu_ps(valid, bias + 16 * h);
        const __m512 v = _mm512_maskz_expand_ps(bits, _mm512_maskz_loadu_ps(first, from));
        _mm512_mask_storeu_ps(to + 16 * h, valid, _mm512_mask_add_ps(rest, bits, v, rest));
        from += n;
    }
}

bool has_compress() {
    return __builtin_cpu_supports("avx512vbmi2") > 0;
}

// Few rows are not worth asking for threads.
template <class F>
void over_rows(int64_t rows, int64_t width, const F& run) {
    constexpr int64_t kGrain = 16384;
    if (rows * width <= kGrain) return run(0, rows);
    torch::stable::parallel_for(0, rows, ceil_div(kGrain, width), run);
}

template <class T>
void gather_rows(const void* source, void* target, const int32_t* index, int64_t tokens,
                 int64_t width, int64_t n) {
    const T* from = static_cast<const T*>(source);
    T* to = static_cast<T*>(target);
    const bool compress = has_compress();
    const ColumnMask mask(index, n, width);
    over_rows(tokens, width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            if (compress)
                gather_row(from + t * width, to + t * n, mask, width);
            else
                for (int64_t j = 0; j < n; ++j) to[t * n + j] = from[t * width + index[j]];
    });
}

template <class T>
void scatter_rows(const void* source, const void* fill_data, void* target, const int32_t* index,
                  int64_t tokens, int64_t width, int64_t n) {
    const T* from = static_cast<const T*>(source);
    const T* fill = static_cast<const T*>(fill_data);
    T* to = static_cast<T*>(target);
    const bool expand = has_compress();
    const ColumnMask mask(index, n, width);
    over_rows(tokens, width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            T* row = to + t * width;
            if (expand) {
                scatter_row(from + t * n, fill, row, mask, width);
                continue;
            }
            if (fill)
                std::memcpy(row, fill, width * sizeof(T));
            else
                std::memset(row, 0, width * sizeof(T));
            for (int64_t j = 0; j < n; ++j) row[index[j]] = from[t * n + j];
        }
    });
}

int64_t check_columns(const Tensor& x, const Tensor& index) {
    sk::check_cpu(x, "x");
    sk::check_dim(x, "x", 2);
    sk::check_contiguous(x, "x");
    sk::check_cpu(index, "index");
    sk::check_dim(index, "index", 1);
    sk::check_dtype(index, "index", ScalarType::Int);
    sk::check_contiguous(index, "index");
    const int64_t bytes = x.element_size();
    STD_TORCH_CHECK(bytes == 2 || bytes == 4, "x: expected 2 or 4 bytes per element, got ", bytes);
    return bytes;
}

void check_bounds(const Tensor& index, int64_t width) {
    STD_TORCH_CHECK(width >= 0, "width: expected a number of columns, got ", width);
    sk::check_index(static_cast<const int32_t*>(index.data_ptr()), index.numel(), "index", 0, width,
                    true);
}

Tensor gather_columns(const Tensor& x, const Tensor& index) {
    const int64_t bytes = check_columns(x, index), tokens = x.size(0), width = x.size(1);
    check_bounds(index, width);
    const int64_t n = index.numel();
    Tensor out = sk::empty(x, {tokens, n});
    if (tokens * n == 0) return out;
    const int32_t* i = static_cast<const int32_t*>(index.data_ptr());
    if (bytes == 2)
        gather_rows<uint16_t>(x.data_ptr(), out.data_ptr(), i, tokens, width, n);
    else
        gather_rows<uint32_t>(x.data_ptr(), out.data_ptr(), i, tokens, width, n);
    return out;
}

Tensor scatter_columns(const Tensor& x, const Tensor& index, int64_t width,
                       std::optional<Tensor> fill) {
    const int64_t bytes = check_columns(x, index), tokens = x.size(0), n = index.numel();
    sk::check_size(x, "x", 1, n);
    check_bounds(index, width);
    const void* rest = nullptr;
    if (fill) {
        sk::check_dtype(*fill, "fill", x.scalar_type());
        sk::check_cpu(*fill, "fill");
        sk::check_contiguous(*fill, "fill");
        sk::check_numel(*fill, "fill", width);
        rest = fill->data_ptr();
    }
    Tensor out = sk::empty(x, {tokens, width});
    if (tokens * width == 0) return out;
    const int32_t* i = static_cast<const int32_t*>(index.data_ptr());
    if (bytes == 2)
        scatter_rows<uint16_t>(x.data_ptr(), rest, out.data_ptr(), i, tokens, width, n);
    else
        scatter_rows<uint32_t>(x.data_ptr(), rest, out.data_ptr(), i, tokens, width, n);
    return out;
}

// bias everywhere, and x on top of it at the columns `index`.
Tensor scatter_biased(const Tensor& x, const Tensor& index, const Tensor& bias) {
    check_columns(x, index);
    sk::check_dtype(x, "x", ScalarType::Float);
    sk::check_cpu(bias, "bias");
    sk::check_dtype(bias, "bias", ScalarType::Float);
    sk::check_contiguous(bias, "bias");
    const int64_t tokens = x.size(0), n = index.numel(), width = bias.numel();
    sk::check_size(x, "x", 1, n);
    check_bounds(index, width);
    Tensor out = sk::empty(x, {tokens, width});
    if (tokens * width == 0) return out;
    const int32_t* i = static_cast<const int32_t*>(index.data_ptr());
    const float* from = static_cast<const float*>(x.data_ptr());
    const float* rest = static_cast<const float*>(bias.data_ptr());
    float* to = static_cast<float*>(out.data_ptr());
    const bool expand = has_compress();
    const ColumnMask mask(i, n, width);
    over_rows(tokens, width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            float* row = to + t * width;
            if (expand) {
                add_row(from + t * n, rest, row, mask, width);
                continue;
            }
            std::memcpy(row, rest, width * sizeof(float));
            for (int64_t j = 0; j < n; ++j) row[i[j]] += from[t * n + j];
        }
    });
    return out;
}

// The first entry of an index outside [low, high) or, `ascending`, not above the one before it.
int64_t first_outside(const Tensor& index, int64_t low, int64_t high, bool ascending) {
    sk::check_cpu(index, "index");
    sk::check_contiguous(index, "index");
    const int64_t n = index.numel();
    if (index.scalar_type() == ScalarType::Int)
        return sk::first_outside(static_cast<const int32_t*>(index.const_data_ptr()), n, low, high,
                                 ascending);
    sk::check_dtype(index, "index", ScalarType::Long);
    return sk::first_outside(static_cast<const int64_t*>(index.const_data_ptr()), n, low, high,
                             ascending);
}

void poison(bool on) {
    sk::poisoned = on;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("gather_columns(Tensor x, Tensor index) -> Tensor");
    m.def("scatter_columns(Tensor x, Tensor index, int width, Tensor? fill) -> Tensor");
    m.def("scatter_biased(Tensor x, Tensor index, Tensor bias) -> Tensor");
    m.def("first_outside(Tensor index, int low, int high, bool ascending) -> int");
    m.def("poison(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("gather_columns", TORCH_BOX(&gather_columns));
    m.impl("scatter_columns", TORCH_BOX(&scatter_columns));
    m.impl("scatter_biased", TORCH_BOX(&scatter_biased));
    m.impl("first_outside", TORCH_BOX(&first_outside));
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CompositeExplicitAutograd, m) {
    m.impl("poison", TORCH_BOX(&poison));
}
