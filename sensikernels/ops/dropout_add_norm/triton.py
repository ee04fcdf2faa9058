"""Kernels for a GPU: a program holds a row in registers and draws its mask there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.drops import Drop
from sensikernels.ops.common.triton_gelu import sum_partials
from sensikernels.ops.common.triton_launch import on_its_device, split
from sensikernels.ops.common.triton_norm import (
    draw_row,
    normalize,
    normalize_backward,
    programs,
    row_options,
    scale_of,
)
from sensikernels.ops.dropout_add_norm.reference import Saved


@triton.jit
def dropout_add_norm_kernel(
    x,
    residual,
    weight,
    bias,
    seed,
    y,
    total,
    moments,
    hidden,
    threshold,
    scale,
    eps,
    DROPS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A row of y, and of what backward reads."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < hidden
    at = row * hidden + n
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        draws = draw_row(tl.load(seed), row, hidden, BLOCK, ALIGNED)
        z = tl.where(draws < threshold, z * scale, 0.0)
    z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z, 0.0)
    if SAVE:
        tl.store(total + at, z.to(total.dtype.element_ty), mask=inside)
    normal, mean, rstd = normalize(z, inside, hidden, eps)
    tl.store(moments + 2 * row, mean)
    tl.store(moments + 2 * row + 1, rstd)
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (normal * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def dropout_add_norm_backward_kernel(
    dy,
    before,
    moments,
    weight,
    bias,
    seed,
    dx,
    dresidual,
    partial,
    rows,
    rows_each,
    hidden,
    threshold,
    scale,
    DROPS: tl.constexpr,
    OUTPUT: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A chunk of rows of dresidual and dx, and their sums for weight and bias.

    ``before`` is the sum or, with OUTPUT, the output.
    """
    chunk = tl.program_id(0)
    first = chunk.to(tl.int64) * rows_each
    n = tl.arange(0, BLOCK)
    inside = n < hidden
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    if OUTPUT:
        shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.where(inside, w, 1.0)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        at = row * hidden + n
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(moments + 2 * row + 1)
        if OUTPUT:
            normal = (z - shift) * inverse
        else:
            normal = tl.where(inside, (z - tl.load(moments + 2 * row)) * rstd, 0.0)
        if AFFINE:
            dweight += grad * normal
            dbias += grad
        dz = normalize_backward(grad, normal, rstd, w, hidden)
        tl.store(dresidual + at, dz.to(dresidual.dtype.element_ty), mask=inside)
        if DROPS:
            draws = draw_row(tl.load(seed), row, hidden, BLOCK, ALIGNED)
            dz = tl.where(draws < threshold, dz * scale, 0.0)
            tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=inside)
    if AFFINE:
        sums = partial + chunk.to(tl.int64) * 2 * hidden + n
        tl.store(sums, dweight, mask=inside)
        tl.store(sums + hidden, dbias, mask=inside)


@on_its_device
def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, drop: Drop, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(y, sum, moments)`` of contiguous matrices; the sum is None unless ``save``."""
    rows, hidden = x.shape
    y, total = x.new_empty(x.shape), x.new_empty(x.shape) if save else None
    moments = x.new_empty((rows, 2), dtype=torch.float32)
    if x.numel():
        results = y, y if total is None else total, moments
        seed = moments if drop.seed is None else drop.seed
        draws = drop.threshold, scale_of(drop.threshold)
        dropout_add_norm_kernel[(rows,)](
            *(x, residual, weight, bias, seed, *results, hidden, *draws, eps),
            DROPS=drop.seed is not None,
            SAVE=save,
            **row_options(hidden),
        )
    return y, total, moments


@on_its_device
def backward(
    dy: Tensor, saved: Saved, drop: Drop, affine_needed: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``(dx, dresidual, daffine)``; the chunks' float32 sums are added in a fixed order."""
    rows, hidden = dy.shape
    drops = drop.seed is not None
    dresidual, dx = dy.new_empty(dy.shape), dy.new_empty(dy.shape) if drops else None
    daffine = saved.moments.new_empty((2, hidden)) if affine_needed else None
    if not dy.numel():
        return dx, dresidual, None if daffine is None else daffine.zero_()
    chunks, each = split(rows, 1, programs(dy))
    partial = saved.moments.new_empty((chunks, 2, hidden) if affine_needed else 1)
    before, moments, weight, bias = saved
    shift = weight if bias is None else bias
    seed = moments if drop.seed is None else drop.seed
    results = dresidual if dx is None else dx, dresidual, partial
    sizes = rows, each, hidden, drop.threshold, scale_of(drop.threshold)
    dropout_add_norm_backward_kernel[(chunks,)](
        *(dy, before, moments, weight, shift, seed, *results, *sizes),
        DROPS=drops,
        OUTPUT=bias is not None,
        AFFINE=affine_needed,
        **row_options(hidden),
    )
    return dx, dresidual, None if daffine is None else sum_partials(partial, daffine)
