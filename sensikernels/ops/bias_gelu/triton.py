"""Kernels for a GPU; Φ and φ from one exponential (``ops/common/triton_gelu.py``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.triton_gelu import gelu, normal, sum_partials
from sensikernels.ops.common.triton_launch import Config, on_its_device, processors, split

FORWARD = Config(tile={"BLOCK_T": 4, "BLOCK_N": 512}, warps=4, stages=1)
BACKWARD = Config(tile={"BLOCK_T": 16, "BLOCK_N": 128}, warps=4, stages=3)


@triton.jit(do_not_specialize=["tokens"])
def bias_gelu_kernel(
    x, bias, y, tokens, width, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of y = gelu(x + bias)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (t < tokens)[:, None] & (n < width)[None, :]
    at = t[:, None] * width + n[None, :]
    pre = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        pre += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, gelu(pre).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "rows_each"])
def bias_gelu_backward_kernel(
    dy,
    x,
    bias,
    dx,
    partial,
    tokens,
    width,
    rows_each,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = dy gelu'(x + bias) of a strip of columns and a chunk of rows, and its column sums."""
    chunk = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    first = chunk.to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, tokens)
    total = tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask = (t < last)[:, None] & inside[None, :]
        at = t[:, None] * width + n[None, :]
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            pre += shift
        cdf, pdf = normal(pre)
        grad *= cdf + pre * pdf
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=mask)
        if SUM:
            total += tl.sum(grad, axis=0)
    if SUM:
        tl.store(partial + chunk * width + n, total, mask=inside)


@on_its_device
def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x + bias)`` of contiguous ``x [rows, width]``."""
    y = x.new_empty(x.shape)
    if y.numel():
        block_t, block_n = FORWARD.tile.values()
        grid = (triton.cdiv(x.shape[1], block_n), triton.cdiv(x.shape[0], block_t))
        shift = x if bias is None else bias.contiguous()
        bias_gelu_kernel[grid](x, shift, y, *x.shape, BIAS=bias is not None, **FORWARD.options)
    return y


@on_its_device
def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """``(dx, dbias)`` of contiguous ``dy`` and ``x`` ``[rows, width]``; dbias empty unless needed.

    Chunks of rows fill the device; their float32 sums are added in a fixed order.
    """
    tokens, width = x.shape
    dx = x.new_empty(x.shape)
    summed = bias is not None and bias_needed
    dbias = bias.new_empty(bias.shape) if summed else x.new_empty(0)
    if not dx.numel():
        return dx, dbias.zero_()
    block_t, block_n = BACKWARD.tile.values()
    strips = triton.cdiv(width, block_n)
    chunks, each = split(tokens, block_t, triton.cdiv(8 * processors(x), strips))
    partial = x.new_empty((chunks, width) if summed else 1, dtype=torch.float32)
    shift = x if bias is None else bias.contiguous()
    bias_gelu_backward_kernel[(strips, chunks)](
        *(dy, x, shift, dx, partial, tokens, width, each),
        BIAS=bias is not None,
        SUM=summed,
        **BACKWARD.options,
    )
    return dx, sum_partials(partial, dbias) if summed else dbias
