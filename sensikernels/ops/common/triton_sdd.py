"""The gradient of kept blocks: sampled dense x dense, grouped, split over tokens, deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.layouts import BlockLayout
from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.common.triton_configs import configs, stage_bytes
from sensikernels.ops.common.triton_gelu import sum_partials
from sensikernels.ops.common.triton_launch import Config

MOST = 3  # linears that may share x in one launch: q, k, v


_COUNTS = ["n0", "n1", "n2", "tokens", "tokens_each", "splits"]


@triton.jit(do_not_specialize=_COUNTS)
def block_gradient_kernel(
    x,
    dy0,
    dy1,
    dy2,
    rows0,
    rows1,
    rows2,
    cols0,
    cols1,
    cols2,
    out,
    n0,
    n1,
    n2,
    tokens,
    tokens_each,
    splits,
    in_width,
    width0,
    width1,
    width2,
    stride_x,
    stride0,
    stride1,
    stride2,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TENSORS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``out[split, block]`` = dY[tokens, block's rows]^T @ x[tokens, block's columns].

    The tile is x-major, ``[BLOCK_N columns of x, BLOCK_M columns of dY]``: narrow blocks are taken
    GROUP neighbours at a time, so that the tile has the rows the tensor cores want. Neighbours in
    block-row order share their dY strip; where a group spans rows, one pass for each row.
    """
    GROUP: tl.constexpr = BLOCK_N // BN if BLOCK_N > BN else 1
    LANES: tl.constexpr = BN if GROUP > 1 else BLOCK_N
    PARTS_M: tl.constexpr = (BM + BLOCK_M - 1) // BLOCK_M
    PARTS_N: tl.constexpr = (BN + BLOCK_N - 1) // BLOCK_N
    groups0, groups1, groups2 = tl.cdiv(n0, GROUP), tl.cdiv(n1, GROUP), tl.cdiv(n2, GROUP)
    each_split = (groups0 + groups1 + groups2) * (PARTS_M * PARTS_N)
    lane = tl.arange(0, BLOCK_N)
    sub = lane // LANES
    m = tl.arange(0, BLOCK_M)
    here = tl.arange(0, BLOCK_T)
    for item in range(tl.program_id(0), splits * each_split, tl.num_programs(0)):
        split = item // each_split
        group = (item % each_split) // (PARTS_M * PARTS_N)
        m0 = (item % PARTS_M) * BLOCK_M
        j0 = ((item // PARTS_M) % PARTS_N) * BLOCK_N
        dy, rows, cols, n, width, stride, skipped = dy0, rows0, cols0, n0, width0, stride0, 0
        if TENSORS > 1:
            if group >= groups0:
                dy, rows, cols, n, width, stride = dy1, rows1, cols1, n1, width1, stride1
                group -= groups0
                skipped = n0
                if group >= groups1:
                    dy, rows, cols, n, width, stride = dy2, rows2, cols2, n2, width2, stride2
                    group -= groups1
                    skipped = n0 + n1
        block = group * GROUP
        blocks = block + sub
        j = j0 + lane % LANES
        t_first = split * tokens_each
        t_last = tl.minimum(t_first + tokens_each, tokens)
        first_row = tl.load(rows + block)
        last_row = first_row
        if GROUP > 1:
            lane_row = tl.load(rows + blocks, mask=blocks < n, other=-1)
            last_row = tl.max(lane_row)
            columns = tl.load(cols + blocks, mask=blocks < n, other=0) * BN + j
            columns = tl.max_contiguous(tl.multiple_of(columns, LANES), LANES)
        else:
            column0 = tl.load(cols + block) * BN + j0
            columns = column0 + lane
        for row in range(first_row, last_row + 1):
            present = True
            if GROUP > 1:
                present = tl.sum((lane_row == row).to(tl.int32)) > 0
            if present:
                features = row * BM + m0 + m
                acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                for t0 in range(t_first, t_last, BLOCK_T):
                    if DESCRIPTORS:
                        a = x.load([t0, column0]).T
                        b = dy.load([t0, row * BM + m0])
                    else:
                        t = t0 + here
                        start = tl.cast(t0, tl.int64)
                        a_at = x + start * stride_x + here[None, :] * stride_x + columns[:, None]
                        b_at = dy + start * stride + here[:, None] * stride + features[None, :]
                        live = t < t_last
                        if EVEN:
                            a = tl.load(a_at, mask=live[None, :], other=0.0)
                            b = tl.load(b_at, mask=live[:, None], other=0.0)
                        else:
                            a_in = (columns < in_width) & (j < BN)
                            b_in = (features < width) & (m0 + m < BM)
                            a = tl.load(a_at, mask=live[None, :] & a_in[:, None], other=0.0)
                            b = tl.load(b_at, mask=live[:, None] & b_in[None, :], other=0.0)
                    if UPCAST:
                        a = a.to(tl.float32)
                        b = b.to(tl.float32)
                    acc = tl.dot(a, b, acc, input_precision=PRECISION)
                wanted = (blocks < n) & (j < BN)
                if GROUP > 1:
                    wanted = wanted & (lane_row == row)
                to = out + tl.cast(split * (n0 + n1 + n2) + skipped + block, tl.int64) * (BM * BN)
                at = (m0 + m)[:, None] * BN + (sub * (BM * BN) + j)[None, :]
                mask = (m0 + m < BM)[:, None] & wanted[None, :]
                tl.store(to + at, acc.T.to(out.dtype.element_ty), mask=mask)


CONFIGS = configs(
    "N M T",
    "128x128x64-w8-s4 128x64x64-w8-s4 128x32x64-w8-s4 "
    "64x128x64-w8-s4 64x64x64-w4-s4 64x32x64-w4-s4 "
    "128x128x32-w8-s3 128x64x32-w8-s4 128x32x32-w8-s4 "
    "64x128x32-w8-s4 64x64x32-w4-s4 64x32x32-w4-s4",
)


def select(block_shape: tuple[int, int], dtype: torch.dtype) -> Config:
    """The configuration for a block shape: 64 or 128 lanes, narrow blocks by the group."""
    height, width = block_shape
    m = max(launch.tile_of(height), 32)
    grouped = width < 64 and width >= 16 and width & (width - 1) == 0
    n = 128 if grouped or width > 64 else 64
    t = 32 if dtype == torch.float32 else 64
    return next(c for c in CONFIGS if tuple(c.tile.values()) == (n, m, t))


@launch.on_its_device
def block_gradients(
    x: Tensor, dys: Sequence[Tensor], layouts: Sequence[BlockLayout]
) -> list[Tensor]:
    """``[n_blocks, bm, bn]`` gradients of the kept blocks of up to ``MOST`` linears that read x.

    One persistent launch (and one reduction where tokens are split); block shapes are equal.
    The results are views of one contiguous arena.
    """
    shape, counts = layouts[0].block_shape, [layout.n_blocks for layout in layouts]
    arena = x.new_empty((sum(counts), *shape))
    if arena.numel() and x.shape[0]:
        _launch(launch.matrix(x), [launch.matrix(dy) for dy in dys], layouts, arena)
    else:
        arena.zero_()
    return list(arena.split(counts))


def _launch(x: Tensor, dys: list[Tensor], layouts: Sequence[BlockLayout], arena: Tensor) -> None:
    (height, width), tokens = layouts[0].block_shape, x.shape[0]
    config = launch.fit(select((height, width), x.dtype), stage_bytes, x)
    n, m, t = config.tile.values()
    even = height % m == 0 and (width % n == 0 or n % width == 0)
    grouped = n > width and n % width == 0
    whole = even and x.shape[1] % width == 0 and all(dy.shape[1] % height == 0 for dy in dys)
    descriptors = even and not grouped and len(dys) == 1 and launch.can_describe(x, *dys)
    groups = sum(triton.cdiv(layout.n_blocks, n // width if grouped else 1) for layout in layouts)
    items = groups * triton.cdiv(height, m) * triton.cdiv(width, n)
    splits, each = launch.split_tokens(items, tokens, t, x)
    out = arena if splits == 1 else arena.new_empty((splits, *arena.shape), dtype=torch.float32)
    padded = [*range(len(dys)), *[0] * (MOST - len(dys))]
    counts = [layout.n_blocks for layout in layouts] + [0] * (MOST - len(dys))
    operands = [x, *(dys[i] for i in padded)]
    if descriptors:
        operands[0] = launch.describe(x, t, n)
        operands[1] = launch.describe(dys[0], t, m)
    block_gradient_kernel[(min(items * splits, launch.programs(x, config)),)](
        *operands,
        *(layouts[i].row_idx for i in padded),
        *(layouts[i].col_idx for i in padded),
        out,
        *counts,
        tokens,
        each,
        splits,
        x.shape[1],
        *(dys[i].shape[1] for i in padded),
        x.stride(0),
        *(dys[i].stride(0) for i in padded),
        BM=height,
        BN=width,
        TENSORS=len(dys),
        DESCRIPTORS=descriptors,
        EVEN=whole,
        PRECISION=launch.precision(x.dtype),
        UPCAST=launch.upcast(x.dtype),
        **config.options,
    )
    if splits > 1:
        sum_partials(out, arena)
