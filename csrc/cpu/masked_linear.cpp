// Activations times a block-sparse weight: forward, and by the transposed index the input gradient.
//
// Activations are read in place; the weight comes from panels, packed line by line while they are
// in cache, or, where its blocks are panels as they lie (float, not transposed), from there.
#include "blocks.h"
#include "cpu/empty.h"

#include <memory>
#include <optional>
#include <vector>

namespace {

using namespace sk;

constexpr int64_t kTokenTile = 192;  // tokens of a task, a multiple of the six rows of a kernel

// Activations [tokens, depth_width] times a grid of panels, summed along each line of the grid.
struct Lines {
    const char* x;
    int64_t tokens, ld, depth;        // ld and depth in elements; depth: of one block
    const int32_t *ptr, *idx;         // blocks of each line
    int64_t lines, width, out_width;  // width of one block across the output
    const char* values;
    const int32_t* perm;               // where the blocks of a block column lie; null: in order
    const char* panels;                // null: the values themselves
    int64_t first_panel;               // the block that `panels` begins with
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
        const __m512 start = s.bias
                                 ? load<BF16>(s.bias, first + v * 16, lanes(last - first - v * 16))
                                 : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) sum[m][v] = start;
    }
    for (int64_t p = s.ptr[line]; p < s.ptr[line + 1]; ++p) {
        const int64_t from = s.idx[p] * s.depth, terms = std::min(s.depth, s.ld - from);
        const char* a = s.x + (t * s.ld + from) * U::bytes;
        const char* b = s.panels ? s.panels + (p - s.first_panel) * s.panel_bytes +
                                       chunk * kChunk * s.panel_units * 4
                                 : s.values + (s.perm[p] * s.depth * s.width + chunk * kChunk) * 4;
        const int64_t pitch = s.panels ? NV * 64 : s.width * 4, units = terms / U::terms;
        multiply<BF16, NV, MR>(sum, a, s.ld * U::bytes, 4, b, pitch, units);
        if (BF16 && terms % 2) {  // the last term alone: its neighbour may be another block's NaN
            uint32_t alone[MR];
            for (int m = 0; m < MR; ++m) {
                uint16_t term;
                std::memcpy(&term, a + m * s.ld * 2 + units * 4, 2);
                alone[m] = term;
            }
            multiply<BF16, NV, MR>(sum, reinterpret_cast<const char*>(alone), 4, 0,
                                   b + units * pitch, 0, 1);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
        store_row<BF16, NV>(s.y, (t + m) * s.out_width + first, last - first, sum[m]);
}

template <bool BF16, int NV>
void line_tile(const Lines& s, int64_t line, int64_t chunk, int64_t begin, int64_t end) {
    int64_t t = begin;
    for (; t + 6 <= end; t += 6) line_rows<BF16, NV, 6>(s, line, chunk, t);
    switch (end - t) {
        case 5:
            return line_rows<BF16, NV, 5>(s, line, chunk, t);
        case 4:
            return line_rows<BF16, NV, 4>(s, line, chunk, t);
        case 3:
            return line_rows<BF16, NV, 3>(s, line, chunk, t);
        case 2:
            return line_rows<BF16, NV, 2>(s, line, chunk, t);
        case 1:
            return line_rows<BF16, NV, 1>(s, line, chunk, t);
        default:
            return;
    }
}

template <bool BF16>
void multiply_tile(const Lines& s, int64_t line, int64_t tile) {
    const int64_t begin = tile * kTokenTile, end = std::min(s.tokens, begin + kTokenTile);
    for (int64_t chunk = 0; chunk * kChunk < s.width; ++chunk)
        by_vectors(s.width - chunk * kChunk,
                   [&](auto nv) { line_tile<BF16, nv()>(s, line, chunk, begin, end); });
}

// Few tokens: packing would cost more than the product, so values are read as they lie.
template <bool BF16, bool TRANSPOSED>
constexpr int64_t kFew = TRANSPOSED && !BF16 ? 16 : 8;

// sum[r][m] += the products of 64 bytes of NR rows of a block and of MT tokens.
template <bool BF16, bool WHOLE, int NR, int MT>
SK_FMA SK_INLINE void few_step(__m512 (&sum)[NR][MT], const char* x, int64_t ld, const char* w,
                               int64_t depth, int64_t terms, bool fetch) {
    constexpr int64_t bytes = Unit<BF16>::bytes;
    __m512i token[MT];
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) {
        const char* at = x + m * ld * bytes;
        token[m] = WHOLE ? _mm512_loadu_si512(at) : load_bits<BF16>(at, terms);
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
        const char* at = w + r * depth * bytes;
        if (fetch) _mm_prefetch(at + NR * depth * bytes, _MM_HINT_T1);
        const __m512i row = WHOLE ? _mm512_loadu_si512(at) : load_bits<BF16>(at, terms);
#pragma GCC unroll 4
        for (int m = 0; m < MT; ++m) sum[r][m] = multiply_add<BF16>(sum[r][m], token[m], row);
    }
}

// y[t, n..n+NR] for MT tokens: dot products along the blocks of a line.
template <bool BF16, int NR, int MT>
SK_FMA void few_forward(const Lines& s, int64_t line, int64_t n, int64_t t) {
    constexpr int64_t bytes = Unit<BF16>::bytes, step = 64 / bytes;
    const bool fetch = t == 0;  // the next rows of each block, while these are read
    __m512 sum[NR][MT];
#pragma GCC unroll 16
    for (int i = 0; i < NR * MT; ++i) sum[i / MT][i % MT] = _mm512_setzero_ps();
    for (int64_t p = s.ptr[line]; p < s.ptr[line + 1]; ++p) {
        const int64_t from = s.idx[p] * s.depth, terms = std::min(s.depth, s.ld - from);
        const char* w = s.values + ((p * s.width + n) * s.depth) * bytes;
        const char* x = s.x + (t * s.ld + from) * bytes;
        int64_t k = 0;
        for (; k + step <= terms; k += step, x += 64, w += 64)
            few_step<BF16, true, NR, MT>(sum, x, s.ld, w, s.depth, step, fetch);
        if (k < terms) few_step<BF16, false, NR, MT>(sum, x, s.ld, w, s.depth, terms - k, fetch);
    }
    for (int r = 0; r < NR; ++r)
        for (int m = 0; m < MT; ++m) {
            const int64_t column = line * s.width + n + r;
            __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(sum[r][m]));
            if (s.bias) total = _mm512_add_ps(total, load<BF16>(s.bias, column, 1));
            store<BF16>(s.y, (t + m) * s.out_width + column, 1, total);
        }
}

// dx[t, chunk] for MT tokens: rows of the blocks of a block column, scaled by dy.
template <bool BF16, int NV, int MT>
SK_FMA void few_grad_input(const Lines& s, int64_t line, int64_t c, int64_t t) {
    constexpr int64_t bytes = Unit<BF16>::bytes;
    const int64_t first = line * s.width + c;
    const int64_t columns = std::min(s.width - c, s.out_width - first);
    __m512 sum[MT][NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV * MT; ++i) sum[i / NV][i % NV] = _mm512_setzero_ps();
    for (int64_t p = s.ptr[line]; p < s.ptr[line + 1]; ++p) {
        const int64_t from = s.idx[p] * s.depth, terms = std::min(s.depth, s.ld - from);
        const char* w = s.values + (s.perm[p] * s.depth * s.width + c) * bytes;
        for (int64_t n = 0; n < terms; ++n) {
            __m512 row[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                row[v] = load<BF16>(w, n * s.width + v * 16, lanes(columns - v * 16));
#pragma GCC unroll 4
            for (int m = 0; m < MT; ++m) {
                const __m512 dy = _mm512_set1_ps(scalar<BF16>(s.x, (t + m) * s.ld + from + n));
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_fmadd_ps(dy, row[v], sum[m][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m)
        store_row<BF16, NV>(s.y, (t + m) * s.out_width + first, columns, sum[m]);
}

// All tokens for some rows of the weight before the next, which are read once.
template <bool BF16, int NR>
void few_rows(const Lines& s, int64_t line, int64_t n) {
    int64_t t = 0;
    for (; t + 4 <= s.tokens; t += 4) few_forward<BF16, NR, 4>(s, line, n, t);
    for (; t < s.tokens; ++t) few_forward<BF16, NR, 1>(s, line, n, t);
}

template <bool BF16, bool TRANSPOSED>
void few_line(const Lines& s, int64_t line) {
    if constexpr (TRANSPOSED) {
        const int64_t rows = std::min(s.width, s.out_width - line * s.width);
        int64_t n = 0;
        for (; n + 4 <= rows; n += 4) few_rows<BF16, 4>(s, line, n);
        for (; n < rows; ++n) few_rows<BF16, 1>(s, line, n);
    } else {
        for (int64_t c = 0; c < s.width; c += kChunk)
            by_vectors(s.width - c, [&](auto nv) {
                int64_t t = 0;
                for (; t + 4 <= s.tokens; t += 4) few_grad_input<BF16, nv(), 4>(s, line, c, t);
                for (; t < s.tokens; ++t) few_grad_input<BF16, nv(), 1>(s, line, c, t);
            });
    }
}

// Columns of a matrix of units [columns, units] as rows of the panel, 16 x 16 at a time.
SK_FMA void transpose(const char* from, int64_t row_bytes, int64_t columns, int64_t units,
                      uint32_t* panel, int64_t pitch) {
    for (int64_t j = 0; j < columns; j += 16)
        for (int64_t u = 0; u < units; u += 16) {
            __m512i r[16], t[16];
            const __mmask16 valid = lanes(units - u);
            for (int i = 0; i < 16; ++i)
                r[i] = j + i < columns
                           ? _mm512_maskz_loadu_epi32(valid, from + (j + i) * row_bytes + u * 4)
                           : _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int i = 0; i < 16; i += 2) {
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 16; i += 4) {
                r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
                r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
                r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
                r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i even0 = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
                const __m512i odd0 = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
                const __m512i even1 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
                const __m512i odd1 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
                t[i] = _mm512_shuffle_i32x4(even0, even1, 0x88);
                t[4 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
                t[8 + i] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
                t[12 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
            }
            for (int i = 0; i < 16 && u + i < units; ++i)
                _mm512_storeu_si512(panel + (u + i) * pitch + j, t[i]);
        }
}

// Panels of `values`: chunks of 64 output columns, each [units, columns], zero beyond the block.
// TRANSPOSED sums over a block's columns (forward), otherwise over its rows (input gradient).
template <bool BF16, bool TRANSPOSED>
void pack_panel(const char* block, int64_t bm, int64_t bn, uint32_t* panel) {
    constexpr int64_t terms = Unit<BF16>::terms, bytes = Unit<BF16>::bytes;
    const int64_t depth = TRANSPOSED ? bn : bm, width = TRANSPOSED ? bm : bn;
    const int64_t units = ceil_div(depth, terms);
    for (int64_t c = 0; c < width; c += kChunk) {
        const int64_t columns = std::min(kChunk, width - c), pitch = padded(columns);
        if (!TRANSPOSED && columns < pitch) std::memset(panel, 0, units * pitch * 4);
        if constexpr (TRANSPOSED) {
            const int64_t whole = depth / terms;
            transpose(block + c * bn * bytes, bn * bytes, columns, whole, panel, pitch);
            if (whole < units)  // an odd number of bfloat16: the last one is paired with zero
                for (int64_t j = 0; j < pitch; ++j) {
                    uint16_t last = 0;
                    if (j < columns) std::memcpy(&last, block + ((c + j) * bn + depth - 1) * 2, 2);
                    panel[whole * pitch + j] = last;
                }
        } else if constexpr (BF16) {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(block) + c;
            for (int64_t u = 0; u < units; ++u, from += 2 * bn)
                interleave(from, 2 * u + 1 < depth ? from + bn : nullptr, panel + u * pitch,
                           columns);
        } else {
            for (int64_t u = 0; u < units; ++u)
                std::memcpy(panel + u * pitch, block + (u * bn + c) * 4, columns * 4);
        }
        panel += units * pitch;
    }
}

template <bool BF16, bool TRANSPOSED>
void pack_panels(const Lines& s, int64_t bm, int64_t bn, int64_t begin, int64_t end, char* to) {
    for (int64_t p = begin; p < end; ++p, to += s.panel_bytes)
        pack_panel<BF16, TRANSPOSED>(
            s.values + (s.perm ? s.perm[p] : p) * bm * bn * Unit<BF16>::bytes, bm, bn,
            reinterpret_cast<uint32_t*>(to));
}

template <bool BF16, bool TRANSPOSED>
void run_lines(Lines s, const Tensor& values) {
    const int64_t n = values.size(0), bm = values.size(1), bn = values.size(2);
    s.depth = TRANSPOSED ? bn : bm;
    s.width = TRANSPOSED ? bm : bn;
    s.values = static_cast<const char*>(values.data_ptr());
    if (s.tokens <= kFew<BF16, TRANSPOSED>)
        return for_each(s.lines, [&](int64_t line) { few_line<BF16, TRANSPOSED>(s, line); });
    s.panel_units = ceil_div(s.depth, Unit<BF16>::terms);
    s.panel_bytes = s.panel_units * padded(s.width) * 4;
    const int64_t tiles = ceil_div(s.tokens, kTokenTile);
    if (!BF16 && !TRANSPOSED && s.width % kLanes == 0)
        return for_each(s.lines * tiles,
                        [&](int64_t i) { multiply_tile<BF16>(s, i / tiles, i % tiles); });
    if (tiles == 1 || s.lines >= 4 * torch::stable::get_num_threads())
        return for_each(s.lines, [&](int64_t line) {
            thread_local std::vector<char> panels;  // reused: fresh pages cost more than packing
            const int64_t begin = s.ptr[line], end = s.ptr[line + 1];
            if (int64_t(panels.size()) < (end - begin) * s.panel_bytes)
                panels.resize((end - begin) * s.panel_bytes);
            pack_panels<BF16, TRANSPOSED>(s, bm, bn, begin, end, panels.data());
            Lines mine = s;
            mine.panels = panels.data();
            mine.first_panel = begin;
            for (int64_t tile = 0; tile < tiles; ++tile) multiply_tile<BF16>(mine, line, tile);
        });
    std::unique_ptr<char[]> panels(new char[n * s.panel_bytes]);
    for_each(n, [&](int64_t p) {
        pack_panels<BF16, TRANSPOSED>(s, bm, bn, p, p + 1, panels.get() + p * s.panel_bytes);
    });
    s.panels = panels.get();
    for_each(s.lines * tiles, [&](int64_t i) { multiply_tile<BF16>(s, i / tiles, i % tiles); });
}

Tensor lines(bool transposed, const Tensor& x, const Tensor& values, const Tensor& ptr,
             const Tensor& idx, const int32_t* perm, const std::optional<Tensor>& bias,
             int64_t out_width) {
    const bool bf16 = check_activations(x, "x");
    check_dim(values, "values", 3);
    check_contiguous(values, "values");
    check_dtype(values, "values", x.scalar_type());
    Lines s{};
    s.x = static_cast<const char*>(x.data_ptr());
    s.tokens = x.size(0);
    s.ld = x.size(1);
    s.ptr = int_data(ptr, "ptr");
    s.idx = int_data(idx, "idx");
    s.lines = ptr.numel() - 1;
    s.perm = perm;
    s.out_width = out_width;
    check_grid({transposed, s.lines, out_width, s.ld, idx.numel()}, values, s.ptr, s.idx, perm);
    if (bias) {
        check_cpu(*bias, "bias");
        check_dtype(*bias, "bias", x.scalar_type());
        check_contiguous(*bias, "bias");
        check_numel(*bias, "bias", out_width);
        s.bias = bias->data_ptr();
    }
    Tensor y = empty(x, {s.tokens, out_width});
    s.y = y.data_ptr();
    if (bf16 && transposed)
        run_lines<true, true>(s, values);
    else if (bf16)
        run_lines<true, false>(s, values);
    else if (transposed)
        run_lines<false, true>(s, values);
    else
        run_lines<false, false>(s, values);
    return y;
}

Tensor block_forward(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                     const Tensor& col_idx, std::optional<Tensor> bias, int64_t out_width) {
    return lines(true, x, values, row_ptr, col_idx, nullptr, bias, out_width);
}

Tensor block_grad_input(const Tensor& dy, const Tensor& values, const Tensor& row_ptr_t,
                        const Tensor& row_idx_t, const Tensor& perm_t, int64_t in_width) {
    const int32_t* perm = int_data(perm_t, "perm_t");
    check_numel(perm_t, "perm_t", row_idx_t.numel());
    return lines(false, dy, values, row_ptr_t, row_idx_t, perm, std::nullopt, in_width);
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
    m.def(
        "block_forward(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, Tensor? bias, "
        "int out_width) -> Tensor");
    m.def(
        "block_grad_input(Tensor dy, Tensor values, Tensor row_ptr_t, Tensor row_idx_t, "
        "Tensor perm_t, int in_width) -> Tensor");
    m.def("block_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("block_forward", TORCH_BOX(&block_forward));
    m.impl("block_grad_input", TORCH_BOX(&block_grad_input));
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CompositeExplicitAutograd, m) {
    m.impl("block_isa", TORCH_BOX(&block_isa));
}
