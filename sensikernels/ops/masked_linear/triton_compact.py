"""Compact layers that stand alone: a GEMM that scatters its columns to full width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.common.triton_configs import configs, stage_bytes
from sensikernels.ops.common.triton_gelu import gelu
from sensikernels.ops.common.triton_launch import Config


@triton.jit
def _contains(rows, n, steps, wanted):
    """Mask of the ``wanted`` among ``rows[:n]``, ascending: one binary search per lane."""
    low = tl.zeros_like(wanted)
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(rows + middle, mask=middle < n, other=2147483647) < wanted
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return tl.load(rows + low, mask=low < n, other=-1) == wanted


@triton.jit(do_not_specialize=["tokens", "steps"])
def compact_linear_kernel(
    x,
    w,
    bias,
    y,
    pre,
    scatter,
    tokens,
    kept,
    steps,
    inner,
    out_width,
    stride_x,
    stride_w,
    SCATTER: tl.constexpr,
    INNER_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y[:, scatter] = act(x @ w^T + bias[scatter])``; other columns get ``act(bias)``.

    ``w`` is ``[kept, inner]`` or, INNER_FIRST, ``[inner, kept]``. Persistent; the tiles that only
    fill dropped columns come last and touch nothing else. EVEN: no tile is cut along ``inner``.
    """
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    tiles_o = tl.cdiv(kept, BLOCK_O)
    here = tl.arange(0, BLOCK_T)
    o = tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_t * tiles_o, tl.num_programs(0)):
        t0 = (tile // tiles_o) * BLOCK_T
        n0 = (tile % tiles_o) * BLOCK_O
        n = n0 + o
        live = t0 + here < tokens
        if not DESCRIPTORS:
            x_at = x + tl.cast(t0, tl.int64) * stride_x + here[:, None] * stride_x + k[None, :]
            if INNER_FIRST:
                w_at = w + k[:, None] * stride_w + n[None, :]
            else:
                w_at = w + n[None, :] * stride_w + k[:, None]
        acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for k0 in range(0, inner, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([t0, k0])
                if INNER_FIRST:
                    b = w.load([k0, n0])
                else:
                    b = w.load([n0, k0]).T
            else:
                w_step = k0 * stride_w if INNER_FIRST else k0
                if EVEN:
                    a = tl.load(x_at + k0, mask=live[:, None], other=0.0)
                    b = tl.load(w_at + w_step, mask=(n < kept)[None, :], other=0.0)
                else:
                    inside = k0 + k < inner
                    a = tl.load(x_at + k0, mask=live[:, None] & inside[None, :], other=0.0)
                    b = tl.load(
                        w_at + w_step, mask=inside[:, None] & (n < kept)[None, :], other=0.0
                    )
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        out = n
        if SCATTER:
            out = tl.load(scatter + n, mask=n < kept, other=0)
        base = tl.cast(t0, tl.int64) * out_width
        at = here[:, None] * out_width + out[None, :]
        mask = live[:, None] & (n < kept)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + out, mask=n < kept, other=0.0).to(tl.float32)[None, :]
        if GELU:
            tl.store(pre + base + at, acc.to(pre.dtype.element_ty), mask=mask)
            acc = gelu(acc)
        tl.store(y + base + at, acc.to(y.dtype.element_ty), mask=mask)
    if SCATTER:
        fill_o = tl.cdiv(out_width, BLOCK_O)
        for tile in range(tl.program_id(0), tiles_t * fill_o, tl.num_programs(0)):
            t0 = (tile // fill_o) * BLOCK_T
            out = (tile % fill_o) * BLOCK_O + o
            dropped = (out < out_width) & (_contains(scatter, kept, steps, out) == 0)
            base = tl.cast(t0, tl.int64) * out_width
            at = here[:, None] * out_width + out[None, :]
            mask = (t0 + here < tokens)[:, None] & dropped[None, :]
            value = tl.zeros([BLOCK_O], tl.float32)
            if HAS_BIAS:
                value = tl.load(bias + out, mask=dropped, other=0.0).to(tl.float32)
            if GELU:
                tl.store(pre + base + at, value.to(pre.dtype.element_ty)[None, :], mask=mask)
                value = gelu(value)
            tl.store(y + base + at, value.to(y.dtype.element_ty)[None, :], mask=mask)


CONFIGS = configs("T O K", "128x128x64-w8-s4 128x64x64-w8-s4 64x64x64-w8-s4 64x64x32-w8-s4")


def select(
    tokens: int, kept: int, dtype: torch.dtype, processors: int, *, scattered: bool
) -> Config:
    """The largest tile that still fills the device; scattered addresses need half its registers."""
    k = 32 if dtype == torch.float32 else 64
    fitting = [
        c
        for c in CONFIGS
        if c.tile["BLOCK_K"] == k and not (scattered and c.tile["BLOCK_O"] == 128)
    ]
    for config in fitting[:-1]:
        t, o, _ = config.tile.values()
        if triton.cdiv(tokens, t) * triton.cdiv(kept, o) >= processors:
            return config
    return fitting[-1]


@launch.on_its_device
def compact_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out_width: int,
    *,
    scatter: Tensor | None = None,
    inner_first: bool = False,
    gelu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(y, preactivation or None)`` of ``compact_linear_kernel``, ``[T, out_width]``.

    ``w`` is ``[kept, inner]`` or, ``inner_first``, its transpose. ``scatter``: the columns of y
    they go to (None: in order).
    """
    x, w = launch.matrix(x), launch.matrix(w)
    tokens, inner = x.shape
    kept = w.shape[1 if inner_first else 0]
    y = x.new_empty((tokens, out_width))
    pre = torch.empty_like(y) if gelu else None
    if not y.numel():
        return y, pre
    config = select(tokens, kept, x.dtype, launch.processors(x), scattered=scatter is not None)
    config = launch.fit(config, stage_bytes, x)
    t, o, k = config.tile.values()
    descriptors = launch.can_describe(x, w)
    tiles = triton.cdiv(tokens, t) * triton.cdiv(out_width if scatter is not None else kept, o)
    compact_linear_kernel[(min(tiles, launch.programs(x, config)),)](
        launch.describe(x, t, k) if descriptors else x,
        (launch.describe(w, k, o) if inner_first else launch.describe(w, o, k))
        if descriptors
        else w,
        y if bias is None else bias,
        y,
        y if pre is None else pre,
        x.new_empty(0, dtype=torch.int32) if scatter is None else scatter,
        tokens,
        kept,
        kept.bit_length(),
        inner,
        out_width,
        x.stride(0),
        w.stride(0),
        SCATTER=scatter is not None,
        INNER_FIRST=inner_first,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        DESCRIPTORS=descriptors,
        EVEN=inner % k == 0,
        PRECISION=launch.precision(x.dtype),
        UPCAST=launch.upcast(x.dtype),
        **config.options,
    )
    return y, pre
