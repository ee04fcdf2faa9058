// Gradient of the kept blocks of a weight: dy^T @ x, where a block is kept.
#include "blocks.h"
#include "cpu/empty.h"

#include <memory>
#include <vector>

namespace {

using namespace sk;

constexpr int64_t kSumTile = 512;  // tokens of a partial sum: bounds its rounding

// Both operands repacked as [tile][token units][columns].
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
                    const uint16_t* even =
                        static_cast<const uint16_t*>(x.data_ptr()) + 2 * u * ld + c * size;
                    interleave(even, 2 * u + 1 < tokens ? even + ld : nullptr, row, columns);
                } else {
                    std::memcpy(row, static_cast<const float*>(x.data_ptr()) + u * ld + c * size,
                                columns * 4);
                }
                std::memset(row + columns, 0, (to.pitch - columns) * 4);
            }
    });
    return to;
}

// One block's gradient over one partial sum of tokens: `sums` is [bm, pitch of x], `out` [bm, bn].
struct Partial {
    const char *dy, *x;
    int64_t dy_pitch, x_pitch, units;  // pitches in units
    int64_t bm, bn;
    bool first, last;  // of the partial sums: nothing to add to, nothing to add after
    float* sums;
    void* out;
};

// Rows m..m+MR, columns from `c` on.
template <bool BF16, int NV, int MR>
SK_FMA void grad_rows(const Partial& s, int64_t m, int64_t c) {
    __m512 sum[MR][NV];
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = _mm512_setzero_ps();
    multiply<BF16, NV, MR>(sum, s.dy + m * 4, 4, s.dy_pitch * 4, s.x + c * 4, s.x_pitch * 4,
                           s.units);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
        float* total = s.sums + (m + i) * s.x_pitch + c;
        if (!s.first)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_loadu_ps(total + v * 16));
        if (s.last)
            store_row<BF16, NV>(s.out, (m + i) * s.bn + c, s.bn - c, sum[i]);
        else
            store_row<false, NV>(total, 0, NV * 16, sum[i]);
    }
}

template <bool BF16, int NV>
void grad_chunk(const Partial& s, int64_t c) {
    int64_t m = 0;
    for (; m + 6 <= s.bm; m += 6) grad_rows<BF16, NV, 6>(s, m, c);
    switch (s.bm - m) {
        case 5:
            return grad_rows<BF16, NV, 5>(s, m, c);
        case 4:
            return grad_rows<BF16, NV, 4>(s, m, c);
        case 3:
            return grad_rows<BF16, NV, 3>(s, m, c);
        case 2:
            return grad_rows<BF16, NV, 2>(s, m, c);
        case 1:
            return grad_rows<BF16, NV, 1>(s, m, c);
        default:
            return;
    }
}

// One linear: its dy, and the block row and column of each kept block.
struct Member {
    Tiles dy;
    const int32_t *rows, *columns;
    int64_t blocks;
};

template <bool BF16>
void run_grad(const std::vector<Member>& members, const Tiles& right, Tensor& out) {
    const int64_t n = out.size(0), bm = out.size(1), bn = out.size(2);
    char* to = static_cast<char*>(out.data_ptr());
    const int64_t step = kSumTile / Unit<BF16>::terms, units = std::max<int64_t>(right.units, 1);
    for_each(n, [&](int64_t p) {
        thread_local std::vector<float> sums;  // reused: fresh pages cost more than a short sum
        if (int64_t(sums.size()) < bm * right.pitch) sums.resize(bm * right.pitch);
        const Member* own = members.data();
        int64_t block = p;
        for (; block >= own->blocks; ++own) block -= own->blocks;
        for (int64_t u = 0; u < units; u += step) {
            const Partial s{own->dy.tile(own->rows[block]) + u * own->dy.pitch * 4,
                            right.tile(own->columns[block]) + u * right.pitch * 4,
                            own->dy.pitch,
                            right.pitch,
                            std::min(step, right.units - u),
                            bm,
                            bn,
                            u == 0,
                            u + step >= units,
                            sums.data(),
                            to + p * bm * bn * Unit<BF16>::bytes};
            for (int64_t c = 0; c < bn; c += kChunk)
                by_vectors(bn - c, [&](auto nv) { grad_chunk<BF16, nv()>(s, c); });
        }
    });
}

// The gradients of all linears that read x, one after the other; x is repacked once for all.
Tensor block_grad_values(std::vector<Tensor> dys, const Tensor& x, std::vector<Tensor> row_idx,
                         std::vector<Tensor> col_idx, int64_t bm, int64_t bn) {
    const bool bf16 = check_activations(x, "x");
    STD_TORCH_CHECK(dys.size() == row_idx.size() && dys.size() == col_idx.size(),
                    "row_idx, col_idx: expected one for each of ", dys.size(), " dys");
    STD_TORCH_CHECK(bm > 0 && bn > 0, "bm, bn: expected block sides above 0");
    int64_t blocks = 0;
    std::vector<Member> members;
    for (size_t i = 0; i < dys.size(); ++i) {
        check_activations(dys[i], "dys");
        check_dtype(dys[i], "dys", x.scalar_type());
        check_size(dys[i], "dys", 0, x.size(0));
        const int64_t kept = row_idx[i].numel();
        check_numel(col_idx[i], "col_idx", kept);
        const int32_t *rows = int_data(row_idx[i], "row_idx"),
                      *columns = int_data(col_idx[i], "col_idx");
        check_index(rows, kept, "row_idx", 0, ceil_div(dys[i].size(1), bm));
        check_index(columns, kept, "col_idx", 0, ceil_div(x.size(1), bn));
        members.push_back(
            {bf16 ? tiles_of<true>(dys[i], bm) : tiles_of<false>(dys[i], bm), rows, columns, kept});
        blocks += kept;
    }
    const Tiles right = bf16 ? tiles_of<true>(x, bn) : tiles_of<false>(x, bn);
    Tensor out = empty(x, {blocks, bm, bn});
    if (bf16)
        run_grad<true>(members, right, out);
    else
        run_grad<false>(members, right, out);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sensikernels_native, m) {
    m.def(
        "block_grad_values(Tensor[] dys, Tensor x, Tensor[] row_idx, Tensor[] col_idx, int bm, "
        "int bn) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sensikernels_native, CPU, m) {
    m.impl("block_grad_values", TORCH_BOX(&block_grad_values));
}
