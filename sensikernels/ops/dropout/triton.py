"""The kernel for a GPU: one Philox call per eight elements."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sensikernels._core.philox import DRAWS, LANES, TILE

CONFIGS = ({"BLOCK": 512, "num_warps": 4, "num_stages": 1},)


@triton.jit
def dropout_kernel(x_ptr, y_ptr, seed_ptr, n, threshold, scale, BLOCK: tl.constexpr):
    """``BLOCK`` counters a program, sixteen consecutive ones to a tile of 128 elements."""
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.randint4x(tl.load(seed_ptr), counter)
    first = (counter // 16).to(tl.int64) * 128 + counter % 16
    for part in tl.static_range(8):
        word = words[part % 4].to(tl.uint32, bitcast=True)
        draw = (word >> (part // 4 * 16)) & 0xFFFF
        element = first + part * 16
        inside = element < n
        x = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(draw < threshold, x * scale, 0.0)
        tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``x`` with elements dropped as by the reference; ``x`` is contiguous."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    config = CONFIGS[0]
    counters = -(-x.numel() // TILE) * LANES
    scale = DRAWS / threshold if threshold else 0.0
    dropout_kernel[(triton.cdiv(counters, config["BLOCK"]),)](
        x, y, seed, x.numel(), threshold, scale, **config
    )
    return y
