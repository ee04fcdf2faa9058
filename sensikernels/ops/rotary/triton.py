"""The kernel for a GPU: a program turns some heads, token by token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.triton_launch import on_its_device

ELEMENTS, LARGEST = 1024, 128
"""Pairs of a program, and the most of one head."""


def options(half: int) -> dict[str, int]:
    """The options of a launch over heads of ``half`` pairs."""
    block = min(triton.next_power_of_2(max(half, 1)), LARGEST)
    return {"BLOCK_R": ELEMENTS // block, "BLOCK_N": block, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["rows"])
def rotary_kernel(
    x,
    cos,
    sin,
    y,
    rows,
    heads,
    half,
    stride_token,
    stride_head,
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of pairs; row r of y is head r % heads of token r // heads."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (r < rows)[:, None] & (j < half)[None, :]
    token = r // heads
    at = token * stride_token + (r % heads) * stride_head
    first = x + at[:, None] + j[None, :]
    angle = token[:, None] * half + j[None, :]
    a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    to = y + r[:, None] * (2 * half) + j[None, :]
    tl.store(to, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
    tl.store(to + half, (b * c + a * s).to(y.dtype.element_ty), mask=mask)


@on_its_device
def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The definition's result, contiguous, of ``x`` with a unit last stride."""
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    tokens, heads, half = x.shape[0], x.shape[1], x.shape[2] // 2
    chosen = options(half)
    grid = (triton.cdiv(tokens * heads, chosen["BLOCK_R"]), triton.cdiv(half, chosen["BLOCK_N"]))
    sizes = tokens * heads, heads, half, x.stride(0), x.stride(1)
    rotary_kernel[grid](x, cos, sin, y, *sizes, INVERSE=inverse, **chosen)
    return y
