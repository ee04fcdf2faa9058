"""Copies of kept entries: columns of activations; a layer's weight, master and moments at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.layouts import BlockLayout, CompactLayout
from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.common.triton_launch import Config

MOST_READ = 3  # matrices whose columns go into one compact copy: dY of q, k, v
MOST_TAKEN = 4  # weight, master copy, two moments


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def gather_columns_kernel(
    src0,
    src1,
    src2,
    cols0,
    cols1,
    cols2,
    dst,
    tokens,
    n0,
    n1,
    n2,
    stride0,
    stride1,
    stride2,
    stride_dst,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dst`` = ``[src0[:, cols0], src1[:, cols1], src2[:, cols2]]``; padding columns are zero."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t0 = tl.program_id(1) * BLOCK_T
    here = tl.arange(0, BLOCK_T)
    live = (t0 + here < tokens)[:, None]
    j = n
    base = tl.cast(t0, tl.int64)
    c = tl.load(cols0 + j, mask=j < n0, other=0)
    at = src0 + base * stride0 + here[:, None] * stride0 + c[None, :]
    value = tl.load(at, mask=live & (j < n0)[None, :], other=0.0)
    if n1 > 0:
        j = n - n0
        mine = (j >= 0) & (j < n1)
        c = tl.load(cols1 + j, mask=mine, other=0)
        at = src1 + base * stride1 + here[:, None] * stride1 + c[None, :]
        value = tl.where(mine[None, :], tl.load(at, mask=live & mine[None, :], other=0.0), value)
    if n2 > 0:
        j = n - n0 - n1
        mine = (j >= 0) & (j < n2)
        c = tl.load(cols2 + j, mask=mine, other=0)
        at = src2 + base * stride2 + here[:, None] * stride2 + c[None, :]
        value = tl.where(mine[None, :], tl.load(at, mask=live & mine[None, :], other=0.0), value)
    to = dst + base * stride_dst + here[:, None] * stride_dst + n[None, :]
    tl.store(to, value, mask=live & (n < stride_dst)[None, :])


@triton.jit
def _copy(src, dst, at, to, mask, live):
    tl.store(dst + to, tl.load(src + at, mask=live, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["count", "height", "width", "tiles_i"])
def take_kept_kernel(
    src0,
    src1,
    src2,
    src3,
    dst0,
    dst1,
    dst2,
    dst3,
    rows,
    cols,
    block_rows,
    block_cols,
    count,
    height,
    width,
    tiles_i,
    out_rows,
    out_cols,
    stride,
    COUNT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """``dst[b, i, j]`` = ``src[rows[r], cols[c]]``: r and c are i and j, in block b offset by it.

    The same for each of COUNT equally shaped sources of any dtypes; features beyond the matrix are
    zero. Without BLOCKS there is one block, the matrix itself.
    """
    which = tl.program_id(2)
    b = tl.program_id(1) // tiles_i
    i = (tl.program_id(1) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    r = i
    c = j
    if BLOCKS:
        r = tl.load(block_rows + b) * height + i
        c = tl.load(block_cols + b) * width + j
    row_in = (i < height) & (r < out_rows)
    col_in = (j < width) & (c < out_cols)
    if HAS_ROWS:
        r = tl.load(rows + r, mask=row_in, other=0)
    if HAS_COLS:
        c = tl.load(cols + c, mask=col_in, other=0)
    at = r.to(tl.int64)[:, None] * stride + c[None, :]
    to = (b.to(tl.int64) * height + i)[:, None] * width + j[None, :]
    mask = (i < height)[:, None] & (j < width)[None, :]
    live = row_in[:, None] & col_in[None, :]
    if which == 0:
        _copy(src0, dst0, at, to, mask, live)
    if COUNT > 1:
        if which == 1:
            _copy(src1, dst1, at, to, mask, live)
    if COUNT > 2:
        if which == 2:
            _copy(src2, dst2, at, to, mask, live)
    if COUNT > 3:
        if which == 3:
            _copy(src3, dst3, at, to, mask, live)


GATHER = Config(tile={"BLOCK_T": 32, "BLOCK_N": 128}, warps=4, stages=1)
TAKE_KEPT = Config(tile={"BLOCK_I": 32, "BLOCK_J": 64}, warps=4, stages=1)


@launch.on_its_device
def gather_columns(sources: Sequence[Tensor], columns: Sequence[Tensor | None]) -> Tensor:
    """``[T, sum of counts]``: the chosen columns of up to ``MOST_READ`` matrices, in one launch.

    None takes all columns of a matrix. The copy's rows are padded by zeros to a multiple of 16
    elements, so that what reads it may copy widely; the result is the view without the padding.
    """
    srcs = [launch.matrix(source) for source in sources]
    x, tokens = srcs[0], srcs[0].shape[0]
    index = [
        torch.arange(s.shape[1], dtype=torch.int32, device=x.device) if c is None else c
        for s, c in zip(srcs, columns, strict=True)
    ]
    counts = [c.shape[0] for c in index]
    total = sum(counts)
    padded = triton.cdiv(total, 16) * 16
    compact = x.new_empty((tokens, padded))
    if compact.numel():
        block_t, block_n = GATHER.tile.values()
        grid = (triton.cdiv(padded, block_n), triton.cdiv(tokens, block_t))
        fill = MOST_READ - len(srcs)
        gather_columns_kernel[grid](
            *srcs,
            *[x] * fill,
            *index,
            *[index[0]] * fill,
            compact,
            tokens,
            *counts,
            *[0] * fill,
            *(s.stride(0) for s in srcs),
            *[0] * fill,
            padded,
            **GATHER.options,
        )
    return compact[:, :total]


@launch.on_its_device
def take_kept(
    tensors: Sequence[Tensor], layout: CompactLayout | BlockLayout, into: Sequence[Tensor] = ()
) -> list[Tensor]:
    """``layouts.kept_values`` of up to ``MOST_TAKEN`` tensors of the weight's shape, in one launch.

    Weight, master copy and moments may differ in dtype. ``into``: contiguous tensors of
    ``layout.values_shape`` to write (a captured graph keeps their addresses); new ones by default.
    """
    srcs = [launch.matrix(tensor) for tensor in tensors]
    dsts = list(into) or [src.new_empty(layout.values_shape) for src in srcs]
    if not dsts[0].numel():
        return dsts
    blocks = isinstance(layout, BlockLayout)
    count, (height, width) = (layout.values_shape[0] if blocks else 1), layout.values_shape[-2:]
    out_rows, out_cols = (layout.out_width, layout.in_width) if blocks else layout.values_shape
    none = srcs[0].new_empty(0, dtype=torch.int32)
    block_i, block_j = TAKE_KEPT.tile.values()
    tiles_i = triton.cdiv(height, block_i)
    fill = MOST_TAKEN - len(srcs)
    take_kept_kernel[(triton.cdiv(width, block_j), count * tiles_i, len(srcs))](
        *srcs,
        *srcs[:1] * fill,
        *dsts,
        *dsts[:1] * fill,
        none if layout.rows is None else layout.rows,
        none if layout.columns is None else layout.columns,
        layout.row_idx if blocks else none,
        layout.col_idx if blocks else none,
        *(count, height, width, tiles_i, out_rows, out_cols, srcs[0].stride(0)),
        COUNT=len(srcs),
        HAS_ROWS=layout.rows is not None,
        HAS_COLS=layout.columns is not None,
        BLOCKS=blocks,
        **TAKE_KEPT.options,
    )
    return dsts
