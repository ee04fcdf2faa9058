"""The weight gradient of kept rows: a product over tokens, split, summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.common.triton_configs import configs, stage_bytes
from sensikernels.ops.common.triton_gelu import sum_partials
from sensikernels.ops.common.triton_launch import Config


@triton.jit(do_not_specialize=["tokens", "tokens_each", "splits", "rows"])
def row_gradient_kernel(
    dy,
    x,
    out,
    tokens,
    tokens_each,
    splits,
    rows,
    readable,
    width,
    stride_dy,
    stride_x,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``out[split]`` = ``dy[tokens, :rows]^T @ x[tokens, :width]``, persistent.

    ``readable >= rows``: how many columns of dY's memory there are, whatever they hold.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    here = tl.arange(0, BLOCK_T)
    for item in range(tl.program_id(0), splits * tiles_m * tiles_n, tl.num_programs(0)):
        split = item // (tiles_m * tiles_n)
        m0 = (item % tiles_m) * BLOCK_M
        n0 = ((item // tiles_m) % tiles_n) * BLOCK_N
        t_first = split * tokens_each
        t_last = tl.minimum(t_first + tokens_each, tokens)
        m_in = m0 + m < readable
        n_in = n0 + n < width
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for t0 in range(t_first, t_last, BLOCK_T):
            if DESCRIPTORS:
                a = dy.load([t0, m0]).T
                b = x.load([t0, n0])
            else:
                start = tl.cast(t0, tl.int64)
                live = t0 + here < t_last
                a_at = dy + start * stride_dy + here[None, :] * stride_dy + (m0 + m)[:, None]
                b_at = x + start * stride_x + here[:, None] * stride_x + (n0 + n)[None, :]
                a = tl.load(a_at, mask=live[None, :] & m_in[:, None], other=0.0)
                if EVEN:
                    b = tl.load(b_at, mask=live[:, None], other=0.0)
                else:
                    b = tl.load(b_at, mask=live[:, None] & n_in[None, :], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        to = out + tl.cast(split * rows + m0, tl.int64) * width
        at = m[:, None] * width + (n0 + n)[None, :]
        mask = (m0 + m < rows)[:, None] & n_in[None, :]
        tl.store(to + at, acc.to(out.dtype.element_ty), mask=mask)


CONFIGS = configs(
    "M N T",
    """
    128x128x64-w8-s4 64x128x64-w4-s4 64x64x64-w4-s4 128x64x32-w8-s4
    64x64x32-w4-s4
    """,
)


def select(rows: int, width: int, dtype: torch.dtype) -> Config:
    """Wide tiles while rows and columns fill them; tokens are split to fill the device."""
    t = 32 if dtype == torch.float32 else 64
    for config in CONFIGS:
        m, n, step = config.tile.values()
        if step == t and (rows > 64 or m == 64) and (width > 64 or n == 64):
            return config
    return next(c for c in reversed(CONFIGS) if c.tile["BLOCK_T"] == t)


@launch.on_its_device
def row_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T @ x``, ``[rows, width]``: float32 sums over token chunks, added in a fixed order."""
    dy, x = launch.matrix(dy), launch.matrix(x)
    (tokens, rows), width = dy.shape, x.shape[1]
    grad = x.new_empty((rows, width))
    if not grad.numel() or not tokens:
        return grad.zero_()
    config = launch.fit(select(rows, width, x.dtype), stage_bytes, x)
    m, n, t = config.tile.values()
    items = triton.cdiv(rows, m) * triton.cdiv(width, n)
    splits, each = launch.split_tokens(items, tokens, t, x)
    out = grad if splits == 1 else grad.new_empty((splits, rows, width), dtype=torch.float32)
    descriptors = launch.can_describe(dy, x)
    row_gradient_kernel[(min(items * splits, launch.programs(x, config)),)](
        launch.describe(dy, t, m) if descriptors else dy,
        launch.describe(x, t, n) if descriptors else x,
        out,
        tokens,
        each,
        splits,
        rows,
        launch.readable(dy),
        width,
        dy.stride(0),
        x.stride(0),
        DESCRIPTORS=descriptors,
        EVEN=width % n == 0,
        PRECISION=launch.precision(x.dtype),
        UPCAST=launch.upcast(x.dtype),
        **config.options,
    )
    return grad if splits == 1 else sum_partials(out, grad)
