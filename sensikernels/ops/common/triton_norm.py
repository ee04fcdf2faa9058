"""A row of a LayerNorm in registers, its backward, and the draws of a dropout beside it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sensikernels._core.philox import DRAWS, TILE
from sensikernels.ops.common.triton_launch import processors


@triton.jit
def draw_row(seed, row, hidden, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The 16-bit draws of elements ``row · hidden + [0, BLOCK)`` of a flat tensor.

    Element 128 t + 64 h + 16 w + l is half h of word w of counter 16 t + l. A row that begins a
    tile draws eight elements from each counter; another draws a counter for each element.
    """
    if ALIGNED:
        counter = row * (hidden // 8) + tl.arange(0, BLOCK // 8)
        w0, w1, w2, w3 = tl.randint4x(seed, counter)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)
        halves = tl.join(words & 0xFFFF, words >> 16)
        halves = tl.reshape(halves, (BLOCK // 128, 16, 2, 2, 2))
        return tl.reshape(tl.permute(halves, (0, 4, 2, 3, 1)), (BLOCK,))
    element = row * hidden + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.randint4x(seed, element // 128 * 16 + element % 16)
    part = element % 128 // 16
    low = tl.where(part % 2 == 0, w0, w1)
    high = tl.where(part % 2 == 0, w2, w3)
    word = tl.where(part % 4 < 2, low, high).to(tl.uint32, bitcast=True)
    return tl.where(part < 4, word & 0xFFFF, word >> 16)


@triton.jit
def normalize(z, inside, hidden, eps):
    """``(z - mean) · rstd``, mean and rstd of a row; ``z`` is zero outside.

    A rounded mean is corrected by what it leaves: of a row of equal elements that is nothing.
    """
    mean = tl.sum(z, 0) / hidden
    mean += tl.sum(tl.where(inside, z - mean, 0.0), 0) / hidden
    off = tl.where(inside, z - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 0) / hidden + eps)
    return off * rstd, mean, rstd


@triton.jit
def normalize_backward(dy, normal, rstd, weight, hidden):
    """Gradient of the row that was normalized; ``dy`` and ``normal`` are zero outside."""
    g = dy * weight
    along = tl.sum(g * normal, 0) / hidden
    mean = tl.sum(g, 0) / hidden
    return rstd * (g - mean - normal * along)


def row_options(hidden: int) -> dict[str, int | bool]:
    """The options of a launch whose programs hold a row in registers."""
    block = max(triton.next_power_of_2(hidden), 16)
    warps = min(max(block // 256, 1), 16)
    return {"BLOCK": block, "ALIGNED": hidden % TILE == 0, "num_warps": warps, "num_stages": 1}


def programs(x: Tensor) -> int:
    """Programs that share the rows of ``x [rows, hidden]`` in backward."""
    return min(x.shape[0], 4 * processors(x))


def scale_of(threshold: int) -> float:
    """The factor of a kept element."""
    return DRAWS / threshold if threshold else 0.0
