"""Cases of geglu: a ModernBERT's dtypes, without a bias and with one."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.geglu.triton import BACKWARD, FORWARD, geglu_backward_kernel, geglu_kernel


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for dtype, bias in (("bf16", ""), ("bf16", "fp32"), ("fp32", ""), ("fp32", "fp32")):
        kind = f"{dtype}-{bias or 'none'}"
        types = {"x": f"*{dtype}", "bias": f"*{bias or dtype}", "tokens n": "i32"}
        yield case(
            geglu_kernel,
            {**types, "y": f"*{dtype}"},
            {"BIAS": bool(bias), **FORWARD.options},
            name=f"geglu/{kind}/{FORWARD.name}",
            multiples="n",
        )
        yield case(
            geglu_backward_kernel,
            {**types, "dy dx": f"*{dtype}", "partial": "*fp32", "rows_each": "i32"},
            {"BIAS": bool(bias), "SUM": bool(bias), **BACKWARD.options},
            name=f"geglu_backward/{kind}/{BACKWARD.name}",
            multiples="n",
        )
