"""Kernels for a GPU; Φ and φ from one exponential (``ops/common/triton_gelu.py``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.triton_gelu import gelu, normal, sum_partials
from sensikernels.ops.common.triton_launch import Config, on_its_device, processors, split

FORWARD = Config(tile={"BLOCK_T": 4, "BLOCK_N": 256}, warps=4, stages=1)
BACKWARD = Config(tile={"BLOCK_T": 16, "BLOCK_N": 64}, warps=4, stages=3)


@triton.jit(do_not_specialize=["tokens"])
def geglu_kernel(
    x, bias, y, tokens, n, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of y = gelu(a) b, a and b the halves of x + bias."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = j < n
    mask = (t < tokens)[:, None] & inside[None, :]
    at = t[:, None] * n + j[None, :]
    first = at + t[:, None] * n
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + first + n, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        a += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + n + j, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, (gelu(a) * b).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "rows_each"])
def geglu_backward_kernel(
    dy,
    x,
    bias,
    dx,
    partial,
    tokens,
    n,
    rows_each,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Both halves of dx of a strip of columns and a chunk of rows, and their column sums."""
    chunk = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = j < n
    begin = chunk * rows_each
    end = tl.minimum(begin + rows_each, tokens)
    total_a = tl.zeros([BLOCK_N], tl.float32)
    total_b = tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        shift_a = tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)[None, :]
        shift_b = tl.load(bias + n + j, mask=inside, other=0.0).to(tl.float32)[None, :]
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & inside[None, :]
        at = t[:, None] * n + j[None, :]
        first = at + t[:, None] * n
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + first + n, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            a += shift_a
            b += shift_b
        cdf, pdf = normal(a)
        da = grad * b * (cdf + a * pdf)
        db = grad * (a * cdf)
        tl.store(dx + first, da.to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + first + n, db.to(dx.dtype.element_ty), mask=mask)
        if SUM:
            total_a += tl.sum(da, axis=0)
            total_b += tl.sum(db, axis=0)
    if SUM:
        tl.store(partial + chunk * 2 * n + j, total_a, mask=inside)
        tl.store(partial + chunk * 2 * n + n + j, total_b, mask=inside)


@on_its_device
def geglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """``[rows, n]`` of contiguous ``x [rows, 2 n]``."""
    tokens, n = x.shape[0], x.shape[1] // 2
    y = x.new_empty((tokens, n))
    if y.numel():
        block_t, block_n = FORWARD.tile.values()
        # Tokens first: the other axes of a grid end at 65,535.
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(n, block_n))
        shift = x if bias is None else bias.contiguous()
        geglu_kernel[grid](x, shift, y, tokens, n, BIAS=bias is not None, **FORWARD.options)
    return y


@on_its_device
def geglu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """``(dx, dbias)`` of contiguous ``dy [rows, n]``, ``x [rows, 2 n]``; dbias empty unless needed.

    Chunks of rows fill the device; their float32 sums are added in a fixed order.
    """
    tokens, n = dy.shape
    dx = x.new_empty(x.shape)
    summed = bias is not None and bias_needed
    dbias = bias.new_empty(bias.shape) if summed else x.new_empty(0)
    if not dx.numel():
        return dx, dbias.zero_()
    block_t, block_n = BACKWARD.tile.values()
    strips = triton.cdiv(n, block_n)
    chunks, each = split(tokens, block_t, triton.cdiv(8 * processors(x), strips))
    partial = x.new_empty((chunks, 2 * n) if summed else 1, dtype=torch.float32)
    shift = x if bias is None else bias.contiguous()
    geglu_backward_kernel[(strips, chunks)](
        *(dy, x, shift, dx, partial, tokens, n, each),
        BIAS=bias is not None,
        SUM=summed,
        **BACKWARD.options,
    )
    return dx, sum_partials(partial, dbias) if summed else dbias
