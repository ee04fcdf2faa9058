"""Loads of a kernel whose tensors have dtypes that it learns from a table."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float(base, kind, at, inside):
    """float32 of ``base[at]``; ``kind``: 0 float32, 1 bfloat16, 2 float16, as an address has none.

    bfloat16 is widened by hand: the interpreter has no arithmetic for it.
    """
    if kind == 0:
        x = tl.load(base.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    elif kind == 1:
        bits = tl.load(base.to(tl.pointer_type(tl.uint16)) + at, mask=inside, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(base.to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0.0)
        x = x.to(tl.float32)
    return x
