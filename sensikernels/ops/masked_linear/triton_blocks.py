"""Block-sparse weight times dense activations: the forward product and, by index, dX."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.layouts import BlockLayout
from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.common.triton_configs import configs, stage_bytes
from sensikernels.ops.common.triton_gelu import gelu
from sensikernels.ops.common.triton_launch import Config


@triton.jit(do_not_specialize=["tokens", "lines"])
def block_linear_kernel(
    x,
    values,
    bias,
    y,
    pre,
    ptr,
    idx,
    perm,
    order,
    tokens,
    in_width,
    out_width,
    lines,
    stride_x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
    """``y[:, line] = act(sum over the line's blocks of x[:, block] @ block + bias)``.

    A line is a block row (forward) or, TRANSPOSED, a block column (dX: ``perm`` finds its blocks).
    Persistent; the longest lines come first. EVEN: neither block nor weight cuts a tile.
    """
    OUT: tl.constexpr = BN if TRANSPOSED else BM
    K: tl.constexpr = BM if TRANSPOSED else BN
    PARTS_O: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    PARTS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    per_line = tl.cdiv(tokens, BLOCK_T) * PARTS_O
    for tile in range(tl.program_id(0), lines * per_line, tl.num_programs(0)):
        line = tl.load(order + tile // per_line)
        o0 = (tile % PARTS_O) * BLOCK_O
        t0 = ((tile % per_line) // PARTS_O) * BLOCK_T
        first = tl.load(ptr + line)
        last = tl.load(ptr + line + 1)
        here = tl.arange(0, BLOCK_T)
        t = t0 + here
        o = o0 + tl.arange(0, BLOCK_O)
        k = tl.arange(0, BLOCK_K)
        x_rows = x
        if not DESCRIPTORS:
            x_rows = x + tl.cast(t0, tl.int64) * stride_x + here[:, None] * stride_x
        acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        coming = tl.load(idx + first, mask=first < last, other=0)
        coming_block = first
        if TRANSPOSED:
            coming_block = tl.load(perm + first, mask=first < last, other=0)
        for step in range(first * PARTS_K, last * PARTS_K):
            k0 = (step % PARTS_K) * BLOCK_K
            column = coming * K + k0
            block = coming_block
            after = (step + 1) // PARTS_K
            coming = tl.load(idx + after, mask=after < last, other=0)
            coming_block = after
            if TRANSPOSED:
                coming_block = tl.load(perm + after, mask=after < last, other=0)
            if DESCRIPTORS:
                a = x.load([t0, column])
                if TRANSPOSED:
                    b = values.load([block * BM + k0, o0])
                else:
                    b = values.load([block * BM + o0, k0]).T
            else:
                from_block = values + tl.cast(block, tl.int64) * (BM * BN)
                if TRANSPOSED:
                    from_block += (k0 + k)[:, None] * BN + o[None, :]
                else:
                    from_block += o[None, :] * BN + (k0 + k)[:, None]
                a_at = x_rows + (column + k)[None, :]
                live = (t < tokens)[:, None]
                if EVEN:
                    a = tl.load(a_at, mask=live, other=0.0)
                    b = tl.load(from_block)
                else:
                    inside = (k0 + k < K) & (column + k < in_width)
                    a = tl.load(a_at, mask=live & inside[None, :], other=0.0)
                    b = tl.load(from_block, mask=inside[:, None] & (o < OUT)[None, :], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        out = line * OUT + o
        kept = (out < out_width) & (o < OUT)
        if HAS_BIAS:
            acc += tl.load(bias + out, mask=kept, other=0.0).to(tl.float32)[None, :]
        base = tl.cast(t0, tl.int64) * out_width
        at = here[:, None] * out_width + out[None, :]
        mask = (t < tokens)[:, None] & kept[None, :]
        if GELU:
            tl.store(pre + base + at, acc.to(pre.dtype.element_ty), mask=mask)
            acc = gelu(acc)
        tl.store(y + base + at, acc.to(y.dtype.element_ty), mask=mask)


CONFIGS = configs(
    "T O K",
    """
    128x128x64-w8-s4 64x128x64-w4-s4 256x64x64-w8-s4 128x64x64-w4-s4
    64x64x64-w4-s4 256x32x64-w8-s4 128x32x64-w4-s4 128x128x32-w8-s4
    64x128x32-w8-s4 256x64x32-w8-s4 128x64x32-w4-s4 64x64x32-w4-s4
    256x32x32-w8-s4 128x32x32-w4-s4 64x32x32-w4-s4
    """,
)


def select(
    out_size: int, inner_size: int, tokens: int, lines: int, dtype: torch.dtype, processors: int
) -> Config:
    """The tile for blocks of ``out_size`` x ``inner_size``: tall, while each processor has one.

    L2 bounds the kernel: a tile of T tokens and b features does T·b/(T + b) operations per byte.
    Exact float32 products need registers for their operands, so tiles stay small.
    """
    o = max(launch.tile_of(out_size), 32)
    k = 32 if dtype == torch.float32 or inner_size <= 32 else 64
    fitting = [c for c in CONFIGS if (c.tile["BLOCK_O"], c.tile["BLOCK_K"]) == (o, k)]
    if dtype == torch.float32 and launch.precision(dtype) == "ieee":
        fitting = [c for c in fitting if c.sums_per_thread <= 32]
    for config in fitting[:-1]:
        tiles = triton.cdiv(tokens, config.tile["BLOCK_T"]) * lines * triton.cdiv(out_size, o)
        if tiles >= processors:
            return config
    return fitting[-1]


@launch.on_its_device
def block_linear(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    gelu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(y, preactivation or None)``: ``act(x @ W^T + bias)``, or ``x @ W`` when transposed."""
    x, values = launch.matrix(x), values.contiguous()
    tokens, (height, width) = x.shape[0], layout.block_shape
    out_width = layout.in_width if transposed else layout.out_width
    y = x.new_empty((tokens, out_width))
    pre = torch.empty_like(y) if gelu else None
    if not y.numel():
        return y, pre
    out_size, inner_size = (width, height) if transposed else (height, width)
    lines = layout.grid_shape[1 if transposed else 0]
    config = launch.fit(
        select(out_size, inner_size, tokens, lines, x.dtype, launch.processors(x)), stage_bytes, x
    )
    t, o, k = config.tile.values()
    whole = out_size % o == 0 and inner_size % k == 0
    table = values.view(-1, width)
    descriptors = whole and launch.can_describe(x, table)
    index = (
        (layout.row_ptr_t, layout.row_idx_t, layout.perm_t, layout.row_order_t)
        if transposed
        else (layout.row_ptr, layout.col_idx, layout.col_idx, layout.row_order)
    )
    tiles = triton.cdiv(tokens, t) * lines * triton.cdiv(out_size, o)
    block_linear_kernel[(min(tiles, launch.programs(x, config)),)](
        launch.describe(x, t, k) if descriptors else x,
        launch.describe(table, *((k, o) if transposed else (o, k))) if descriptors else values,
        y if bias is None else bias,
        y,
        y if pre is None else pre,
        *index,
        tokens,
        x.shape[1],
        out_width,
        lines,
        x.stride(0),
        BM=height,
        BN=width,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        DESCRIPTORS=descriptors,
        EVEN=whole and x.shape[1] % inner_size == 0,
        PRECISION=launch.precision(x.dtype),
        UPCAST=launch.upcast(x.dtype),
        **config.options,
    )
    return y, pre
