"""Cases of bias_gelu: a BERT's dtypes of rows and bias."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.bias_gelu.triton import (
    BACKWARD,
    FORWARD,
    bias_gelu_backward_kernel,
    bias_gelu_kernel,
)


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for dtype, bias in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        yield case(
            bias_gelu_kernel,
            {"x y": f"*{dtype}", "bias": f"*{bias}", "tokens width": "i32"},
            {"BIAS": True, **FORWARD.options},
            name=f"bias_gelu/{dtype}-{bias}/{FORWARD.name}",
            multiples="width",
        )
        yield case(
            bias_gelu_backward_kernel,
            {
                "dy x dx": f"*{dtype}",
                "bias": f"*{bias}",
                "partial": "*fp32",
                "tokens width rows_each": "i32",
            },
            {"BIAS": True, "SUM": True, **BACKWARD.options},
            name=f"bias_gelu_backward/{dtype}-{bias}/{BACKWARD.name}",
            multiples="width",
        )
