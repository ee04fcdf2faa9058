// Gather and scatter of feature columns, and products with a block-sparse weight.
//
// The block products read activations in place and the weight from panels packed once per call, in
// the unit of the multiply-add: one float, or two consecutive bfloat16 of the summed dimension.
// Sums are float, in a fixed order per output, so results do not depend on the number of threads.
#include "checks.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own avx512fintrin.h

#define SK_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))
#define SK_FMA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define SK_INLINE inline __attribute__((always_inline))

namespace {

using sk::ScalarType;
using sk::Tensor;

constexpr int64_t kLanes = 16;       // units in a vector
constexpr int64_t kChunk = 64;       // columns of a panel chunk: four vectors
constexpr int64_t kTokenTile = 192;  // tokens of a task, a multiple of the six rows of a kernel
constexpr int64_t kSumTile = 2048;   // tokens summed in registers before a partial sum is stored

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void for_each(int64_t n, const F& run) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t lane = begin; lane < end; ++lane)
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) run(i);
    });
}

// Columns -------------------------------------------------------------------------------------

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
        const __m512i rest = fill ? _mm512_maskz_loadu_epi16(valid, fill + 32 * w)
                                  : _mm512_setzero_si512();
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
        const __m512i rest = fill ? _mm512_maskz_loadu_epi32(valid, fill + 16 * h)
                                  : _mm512_setzero_si512();
        const __m512i v = _mm512_maskz_loadu_epi32(first, from);
        _mm512_mask_storeu_epi32(to + 16 * h, valid, _mm512_mask_expand_epi32(rest, bits, v));
        from += n;
    }
}

bool has_compress() { return __builtin_cpu_supports("avx512vbmi2") > 0; }

template <class T>
void gather_rows(const void* source, void* target, const int32_t* index, int64_t tokens,
                 int64_t width, int64_t n) {
    const T* from = static_cast<const T*>(source);
    T* to = static_cast<T*>(target);
    const bool compress = has_compress();
    const ColumnMask mask(index, n, width);
    torch::stable::parallel_for(0, tokens, ceil_div(16384, width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            if (compress) gather_row(from + t * width, to + t * n, mask, width);
            else for (int64_t j = 0; j < n; ++j) to[t * n + j] = from[t * width + index[j]];
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
    torch::stable::parallel_for(0, tokens, ceil_div(16384, width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            T* row = to + t * width;
            if (expand) {
                scatter_row(from + t * n, fill, row, mask, width);
                continue;
            }
            if (fill) std::memcpy(row, fill, width * sizeof(T));
            else std::memset(row, 0, width * sizeof(T));
            for (int64_t j = 0; j < n; ++j) row[index[j]] = from[t * n + j];
        }
    });
}

int64_t check_columns(const Tensor& x, const Tensor& index) {
    sk::check_cpu(x, "x");
    sk::check_dim(x, "x", 2);
    sk::check_contiguous(x, "x");
    sk::check_dtype(index, "index", ScalarType::Int);
    sk::check_contiguous(index, "index");
    const int64_t bytes = x.element_size();
    STD_TORCH_CHECK(bytes == 2 || bytes == 4, "x: expected 2 or 4 bytes per element, got ", bytes);
    return bytes;
}

void check_bounds(const Tensor& index, int64_t width) {
    const int32_t* i = static_cast<const int32_t*>(index.data_ptr());
    const int64_t n = index.numel();
    STD_TORCH_CHECK(n == 0 || (i[0] >= 0 && i[n - 1] < width),
                    "index: expected ascending columns below ", width, ", got ", i[n - 1]);
}

Tensor gather_columns(const Tensor& x, const Tensor& index) {
    const int64_t bytes = check_columns(x, index), tokens = x.size(0), width = x.size(1);
    check_bounds(index, width);
    const int64_t n = index.numel();
    Tensor out = torch::stable::new_empty(x, {tokens, n});
    if (tokens * n == 0) return out;
    const int32_t* i = static_cast<const int32_t*>(index.data_ptr());
    if (bytes == 2) gather_rows<uint16_t>(x.data_ptr(), out.data_ptr(), i, tokens, width, n);
    else gather_rows<uint32_t>(x.data_ptr(), out.data_ptr(), i, tokens, width, n);
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
        sk::check_contiguous(*fill, "fill");
        sk::check_size(*fill, "fill", 0, width);
        rest = fill->data_ptr();
    }
    Tensor out = torch::stable::new_empty(x, {tokens, width});
    if (tokens * width == 0) return out;
    const int32_t* i = static_cast<const int32_t*>(index.data_ptr());
    if (bytes == 2)
        scatter_rows<uint16_t>(x.data_ptr(), rest, out.data_ptr(), i, tokens, width, n);
    else
        scatter_rows<uint32_t>(x.data_ptr(), rest, out.data_ptr(), i, tokens, width, n);
    return out;
}

// Blocks --------------------------------------------------------------------------------------

// A unit is 4 bytes: one float, or a pair of bfloat16 of the summed dimension.
template <bool BF16>
struct Unit {
    static constexpr int64_t terms = BF16 ? 2 : 1;
    static constexpr int64_t bytes = BF16 ? 2 : 4;
};

template <bool BF16>
SK_FMA SK_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    if constexpr (BF16) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    else return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
}

// sum[m][v] += a[m][k] * b[k][v] over `units`; strides in bytes, b's rows are NV vectors.
template <bool BF16, int NV, int MR>
SK_FMA SK_INLINE void multiply(__m512 (&sum)[MR][NV], const char* a, int64_t a_m, int64_t a_k,
                               const char* b, int64_t units) {
    for (int64_t k = 0; k < units; ++k, a += a_k, b += NV * 64) {
        __m512i right[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) right[v] = _mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
            int32_t unit;
            std::memcpy(&unit, a + m * a_m, 4);
            const __m512i left = _mm512_set1_epi32(unit);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[m][v] = multiply_add<BF16>(sum[m][v], left, right[v]);
        }
    }
}

template <bool BF16>
SK_FMA SK_INLINE __m512 load(const void* p, int64_t i, __mmask16 valid) {
    if constexpr (BF16) {
        const __m256i half = _mm256_maskz_loadu_epi16(valid, static_cast<const uint16_t*>(p) + i);
        return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    } else {
        return _mm512_maskz_loadu_ps(valid, static_cast<const float*>(p) + i);
    }
}

template <bool BF16>
SK_FMA SK_INLINE void store(void* p, int64_t i, __mmask16 valid, __m512 v) {
    if constexpr (BF16)
        _mm256_mask_storeu_epi16(
            static_cast<uint16_t*>(p) + i, valid, (__m256i)_mm512_cvtneps_pbh(v));
    else
        _mm512_mask_storeu_ps(static_cast<float*>(p) + i, valid, v);
}

SK_INLINE __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }

// Activations [tokens, depth_width] times a grid of panels, summed along each line of the grid.
struct Lines {
    const char* x;
    int64_t tokens, ld, depth;         // ld and depth in elements; depth: of one block
    const int32_t *ptr, *idx;          // blocks of each line
    int64_t lines, width, out_width;   // width of one block across the output
    const char* panels;
    int64_t panel_bytes, panel_units;  // of one block
    const void* bias;
    void* y;
};

template <bool BF16, int NV, int MR>
SK_FMA void line_rows(const Lines& s, int64_t line, int64_t chunk, int64_t t) {
    using U = Unit<BF16>;
    const int64_t first = line * s.width + chunk * kChunk;
    const int64_t last = std::min(s.out_width, std::min(first + kChunk, (line + 1) * s.width));
    __m512 sum[MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const __m512 start = s.bias ? load<BF16>(s.bias, first + v * 16, lanes(last - first - v * 16))
                                    : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) sum[m][v] = start;
    }
    for (int64_t p = s.ptr[line]; p < s.ptr[line + 1]; ++p) {
        const int64_t from = s.idx[p] * s.depth, terms = std::min(s.depth, s.ld - from);
        const char* a = s.x + (t * s.ld + from) * U::bytes;
        const char* b = s.panels + p * s.panel_bytes + chunk * kChunk * s.panel_units * 4;
        const int64_t units = terms / U::terms;
        multiply<BF16, NV, MR>(sum, a, s.ld * U::bytes, 4, b, units);
        if (BF16 && terms % 2) {  // the last term alone: its neighbour may be another block's NaN
            uint32_t alone[MR];
            for (int m = 0; m < MR; ++m) {
                uint16_t term;
                std::memcpy(&term, a + m * s.ld * 2 + units * 4, 2);
                alone[m] = term;
            }
            multiply<BF16, NV, MR>(
                sum, reinterpret_cast<const char*>(alone), 4, 0, b + units * NV * 64, 1);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            store<BF16>(s.y, (t + m) * s.out_width + first + v * 16,
                        lanes(last - first - v * 16), sum[m][v]);
}

template <bool BF16, int NV>
void line_tile(const Lines& s, int64_t line, int64_t chunk, int64_t begin, int64_t end) {
    int64_t t = begin;
    for (; t + 6 <= end; t += 6) line_rows<BF16, NV, 6>(s, line, chunk, t);
    switch (end - t) {
        case 5: return line_rows<BF16, NV, 5>(s, line, chunk, t);
        case 4: return line_rows<BF16, NV, 4>(s, line, chunk, t);
        case 3: return line_rows<BF16, NV, 3>(s, line, chunk, t);
        case 2: return line_rows<BF16, NV, 2>(s, line, chunk, t);
        case 1: return line_rows<BF16, NV, 1>(s, line, chunk, t);
        default: return;
    }
}

// Calls f<NV>() for the vectors that the columns from `column` on need.
template <class F>
SK_INLINE void by_vectors(int64_t columns, const F& f) {
    switch (std::min<int64_t>(4, ceil_div(columns, kLanes))) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        default: return f(std::integral_constant<int, 4>());
    }
}

template <bool BF16>
void multiply_lines(const Lines& s) {
    const int64_t tiles = ceil_div(s.tokens, kTokenTile);
    for_each(s.lines * tiles, [&](int64_t i) {
        const int64_t line = i / tiles, begin = i % tiles * kTokenTile;
        const int64_t end = std::min(s.tokens, begin + kTokenTile);
        for (int64_t chunk = 0; chunk * kChunk < s.width; ++chunk)
            by_vectors(s.width - chunk * kChunk, [&](auto nv) {
                line_tile<BF16, nv()>(s, line, chunk, begin, end);
            });
    });
}

int64_t padded(int64_t width) { return ceil_div(width, kLanes) * kLanes; }

// Panels of `values`: chunks of 64 output columns, each [units, columns], zero beyond the block.
// TRANSPOSED sums over a block's columns (forward), otherwise over its rows (input gradient).
template <bool BF16, bool TRANSPOSED>
void pack_panel(const char* block, int64_t bm, int64_t bn, uint32_t* panel) {
    constexpr int64_t terms = Unit<BF16>::terms;
    const int64_t depth = TRANSPOSED ? bn : bm, width = TRANSPOSED ? bm : bn;
    const int64_t units = ceil_div(depth, terms);
    for (int64_t c = 0; c < width; c += kChunk) {
        const int64_t columns = std::min(kChunk, width - c), pitch = padded(columns);
        if (columns < pitch) std::memset(panel, 0, units * pitch * 4);
        if constexpr (BF16) {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(block);
            const int64_t along = TRANSPOSED ? 1 : bn, across = TRANSPOSED ? bn : 1;
            auto put = [&](int64_t u, int64_t j) {
                const uint16_t* at = from + (c + j) * across + 2 * u * along;
                const uint32_t high = 2 * u + 1 < depth ? at[along] : 0;
                panel[u * pitch + j] = at[0] | high << 16;
            };
            if constexpr (TRANSPOSED)
                for (int64_t j = 0; j < columns; ++j) for (int64_t u = 0; u < units; ++u) put(u, j);
            else
                for (int64_t u = 0; u < units; ++u) for (int64_t j = 0; j < columns; ++j) put(u, j);
        } else {
            const uint32_t* from = reinterpret_cast<const uint32_t*>(block);
            if constexpr (TRANSPOSED) {
                for (int64_t j = 0; j < columns; ++j)
                    for (int64_t u = 0; u < units; ++u) panel[u * pitch + j] = from[(c + j) * bn + u];
            } else {
                for (int64_t u = 0; u < units; ++u)
                    std::memcpy(panel + u * pitch, from + u * bn + c, columns * 4);
            }
        }
        panel += units * pitch;
    }
}

template <bool BF16, bool TRANSPOSED>
void run_lines(Lines s, const Tensor& values, const int32_t* perm) {
    const int64_t n = values.size(0), bm = values.size(1), bn = values.size(2);
    s.depth = TRANSPOSED ? bn : bm;
    s.width = TRANSPOSED ? bm : bn;
    s.panel_units = ceil_div(s.depth, Unit<BF16>::terms);
    s.panel_bytes = s.panel_units * padded(s.width) * 4;
    std::unique_ptr<char[]> panels(new char[n * s.panel_bytes]);
    const char* from = static_cast<const char*>(values.data_ptr());
    for_each(n, [&](int64_t p) {
        const char* block = from + (perm ? perm[p] : p) * bm * bn * Unit<BF16>::bytes;
        pack_panel<BF16, TRANSPOSED>(
            block, bm, bn, reinterpret_cast<uint32_t*>(panels.get() + p * s.panel_bytes));
    });
    s.panels = panels.get();
    multiply_lines<BF16>(s);
}

const int32_t* int_data(const Tensor& t, const char* name) {
    sk::check_cpu(t, name);
    sk::check_dtype(t, name, ScalarType::Int);
    sk::check_contiguous(t, name);
    return static_cast<const int32_t*>(t.data_ptr());
}

bool check_activations(const Tensor& x, const char* name) {
    sk::check_cpu(x, name);
    sk::check_dim(x, name, 2);
    sk::check_contiguous(x, name);
    const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
    if (!bf16) sk::check_dtype(x, name, ScalarType::Float);
    return bf16;
}

Tensor lines(bool transposed, const Tensor& x, const Tensor& values, const Tensor& ptr,
             const Tensor& idx, const int32_t* perm, const std::optional<Tensor>& bias,
             int64_t out_width) {
    const bool bf16 = check_activations(x, "x");
    sk::check_dim(values, "values", 3);
    sk::check_contiguous(values, "values");
    sk::check_dtype(values, "values", x.scalar_type());
    Lines s{};
    s.x = static_cast<const char*>(x.data_ptr());
    s.tokens = x.size(0);
    s.ld = x.size(1);
    s.ptr = int_data(ptr, "ptr");
    s.idx = int_data(idx, "idx");
    s.lines = ptr.numel() - 1;
    s.out_width = out_width;
    if (bias) {
        sk::check_dtype(*bias, "bias", x.scalar_type());
        sk::check_contiguous(*bias, "bias");
        sk::check_size(*bias, "bias", 0, out_width);
        s.bias = bias->data_ptr();
    }
    Tensor y = torch::stable::new_empty(x, {s.tokens, out_width});
    s.y = y.data_ptr();
    if (bf16 && transposed) run_lines<true, true>(s, values, perm);
    else if (bf16) run_lines<true, false>(s, values, perm);
    else if (transposed) run_lines<false, true>(s, values, perm);
    else run_lines<false, false>(s, values, perm);
    return y;
}

Tensor block_forward(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                     const Tensor& col_idx, std::optional<Tensor> bias, int64_t out_width) {
    return lines(true, x, values, row_ptr, col_idx, nullptr, bias, out_width);
}

Tensor block_grad_input(const Tensor& dy, const Tensor& values, const Tensor& row_ptr_t,
                        const Tensor& row_idx_t, const Tensor& perm_t, int64_t in_width) {
    const int32_t* perm = int_data(perm_t, "perm_t");
    return lines(false, dy, values, row_ptr_t, row_idx_t, perm, std::nullopt, in_width);
}

// Gradient of the blocks: both operands repacked as [tile][token units][columns].
struct Tiles {
    std::unique_ptr<uint32_t[]> data;
    int64_t units, pitch;

    const char* tile(int64_t i) const {
        return reinterpret_cast<const char*>(data.get() + i * units * pitch);
    }
};

template <bool BF16>
Tiles tiles_of(const Tensor& x, int64_t size) {
    constexpr int64_t terms = Unit<BF16>::terms;
    const int64_t tokens = x.size(0), ld = x.size(1), n = ceil_div(ld, size);
    Tiles to{nullptr, ceil_div(tokens, terms), padded(size)};
    to.data.reset(new uint32_t[n * to.units * to.pitch]);
    const int64_t step = 64;
    for_each(ceil_div(to.units, step), [&](int64_t i) {
        for (int64_t u = i * step; u < std::min(to.units, (i + 1) * step); ++u)
            for (int64_t c = 0; c < n; ++c) {
                uint32_t* row = to.data.get() + (c * to.units + u) * to.pitch;
                const int64_t columns = std::min(size, ld - c * size);
                if constexpr (BF16) {
                    const uint16_t* x0 = static_cast<const uint16_t*>(x.data_ptr());
                    const uint16_t* even = x0 + 2 * u * ld + c * size;
                    const uint16_t* odd = even + ld;
                    if (2 * u + 1 < tokens)
                        for (int64_t j = 0; j < columns; ++j) row[j] = even[j] | uint32_t(odd[j]) << 16;
                    else
                        for (int64_t j = 0; j < columns; ++j) row[j] = even[j];
                } else {
                    std::memcpy(row, static_cast<const float*>(x.data_ptr()) + u * ld + c * size,
                                columns * 4);
                }
                std::memset(row + columns, 0, (to.pitch - columns) * 4);
            }
    });
    return to;
}

// Rows n..n+MR of one block's gradient, columns of one chunk; `sums` is [bm, pitch of x].
template <bool BF16, int NV, int MR>
SK_FMA void grad_rows(const Tiles& dy, const Tiles& x, const char* a, const char* b, int64_t units,
                      bool first, float* sums) {
    __m512 sum[MR][NV];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            sum[m][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m * x.pitch + v * 16);
    for (int64_t k = 0; k < units; ++k, a += dy.pitch * 4, b += x.pitch * 4)
        multiply<BF16, NV, MR>(sum, a, 4, 0, b, 1);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) _mm512_storeu_ps(sums + m * x.pitch + v * 16, sum[m][v]);
}

template <bool BF16, int NV>
void grad_chunk(const Tiles& dy, const Tiles& x, const char* a, const char* b, int64_t units,
                bool first, int64_t bm, float* sums) {
    int64_t m = 0;
    for (; m + 6 <= bm; m += 6)
        grad_rows<BF16, NV, 6>(dy, x, a + m * 4, b, units, first, sums + m * x.pitch);
    a += m * 4;
    sums += m * x.pitch;
    switch (bm - m) {
        case 5: return grad_rows<BF16, NV, 5>(dy, x, a, b, units, first, sums);
        case 4: return grad_rows<BF16, NV, 4>(dy, x, a, b, units, first, sums);
        case 3: return grad_rows<BF16, NV, 3>(dy, x, a, b, units, first, sums);
        case 2: return grad_rows<BF16, NV, 2>(dy, x, a, b, units, first, sums);
        case 1: return grad_rows<BF16, NV, 1>(dy, x, a, b, units, first, sums);
        default: return;
    }
}

template <bool BF16>
SK_FMA void write_block(const float* sums, int64_t pitch, void* out, int64_t bm, int64_t bn) {
    for (int64_t m = 0; m < bm; ++m)
        for (int64_t j = 0; j < bn; j += 16)
            store<BF16>(out, m * bn + j, lanes(bn - j), _mm512_loadu_ps(sums + m * pitch + j));
}

template <bool BF16>
void run_grad(const Tensor& dy, const Tensor& x, const int32_t* rows, const int32_t* columns,
              Tensor& out) {
    const int64_t n = out.size(0), bm = out.size(1), bn = out.size(2);
    const Tiles left = tiles_of<BF16>(dy, bm), right = tiles_of<BF16>(x, bn);
    char* to = static_cast<char*>(out.data_ptr());
    const int64_t step = kSumTile / Unit<BF16>::terms;
    for_each(n, [&](int64_t p) {
        std::unique_ptr<float[]> sums(new float[bm * right.pitch]);
        for (int64_t u = 0; u < std::max<int64_t>(left.units, 1); u += step)
            for (int64_t c = 0; c < bn; c += kChunk)
                by_vectors(bn - c, [&](auto nv) {
                    grad_chunk<BF16, nv()>(
                        left, right, left.tile(rows[p]) + u * left.pitch * 4,
                        right.tile(columns[p]) + (u * right.pitch + c) * 4,
                        std::min(step, left.units - u), u == 0, bm, sums.get() + c);
                });
        write_block<BF16>(
            sums.get(), right.pitch, to + p * bm * bn * Unit<BF16>::bytes, bm, bn);
    });
}

Tensor block_grad_values(const Tensor& dy, const Tensor& x, const Tensor& row_idx,
                         const Tensor& col_idx, int64_t bm, int64_t bn) {
    const bool bf16 = check_activations(dy, "dy");
    check_activations(x, "x");
    sk::check_dtype(x, "x", dy.scalar_type());
    sk::check_size(x, "x", 0, dy.size(0));
    const int32_t *rows = int_data(row_idx, "row_idx"), *columns = int_data(col_idx, "col_idx");
    Tensor out = torch::stable::new_empty(dy, {row_idx.numel(), bm, bn});
    if (bf16) run_grad<true>(dy, x, rows, columns, out);
    else run_grad<false>(dy, x, rows, columns, out);
    return out;
}

// 0: no block products on this processor; 1: float; 2: bfloat16 too.
int64_t block_isa() {
    for (bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                     __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512dq")})
        if (!has) return 0;
    return __builtin_cpu_supports("avx512bf16") ? 2 : 1;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def("gather_columns(Tensor x, Tensor index) -> Tensor");
    m.def("scatter_columns(Tensor x, Tensor index, int width, Tensor? fill) -> Tensor");
    m.def(
        "block_forward(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, Tensor? bias, "
        "int out_width) -> Tensor");
    m.def(
        "block_grad_input(Tensor dy, Tensor values, Tensor row_ptr_t, Tensor row_idx_t, "
        "Tensor perm_t, int in_width) -> Tensor");
    m.def(
        "block_grad_values(Tensor dy, Tensor x, Tensor row_idx, Tensor col_idx, int bm, int bn) "
        "-> Tensor");
    m.def("block_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("gather_columns", TORCH_BOX(&gather_columns));
    m.impl("scatter_columns", TORCH_BOX(&scatter_columns));
    m.impl("block_forward", TORCH_BOX(&block_forward));
    m.impl("block_grad_input", TORCH_BOX(&block_grad_input));
    m.impl("block_grad_values", TORCH_BOX(&block_grad_values));
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CompositeExplicitAutograd, m) {
    m.impl("block_isa", TORCH_BOX(&block_isa));
}
