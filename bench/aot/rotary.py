"""Cases of rotary: heads of 64 and of 128, angles in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.aot.case import Case, case
from sensikernels.ops.rotary.triton import options, rotary_kernel


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    sizes = "half stride_token stride_head"
    for dtype, size, inverse in product(("bf16", "fp32"), (64, 128), (False, True)):
        yield case(
            rotary_kernel,
            {"x y": f"*{dtype}", "cos sin": "*fp32", f"rows heads {sizes}": "i32"},
            {"INVERSE": inverse, **options(size // 2)},
            name=f"rotary/{dtype}/{size}" + "/inverse" * inverse,
            multiples=sizes,
        )
