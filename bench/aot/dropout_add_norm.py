"""Cases of dropout_add_norm: the widths of BERTs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.aot.case import Case, case
from sensikernels.ops.common.triton_norm import row_options
from sensikernels.ops.dropout_add_norm.triton import (
    dropout_add_norm_backward_kernel,
    dropout_add_norm_kernel,
)


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    types = {"weight bias moments": "*fp32", "seed": "*i64", "hidden threshold": "i32"}
    types |= {"scale": "fp32"}
    for dtype, hidden in product(("bf16", "fp32"), (384, 768, 1024)):
        options = row_options(hidden)
        yield case(
            dropout_add_norm_kernel,
            {**types, "x residual y total": f"*{dtype}", "eps": "fp32"},
            {"DROPS": True, "SAVE": True, **options},
            name=f"dropout_add_norm/{dtype}/{hidden}",
            multiples="hidden",
        )
        rows = {"dy before dx dresidual": f"*{dtype}", "rows rows_each": "i32"}
        for output in (False, True):
            yield case(
                dropout_add_norm_backward_kernel,
                {**types, **rows, "partial": "*fp32"},
                {"DROPS": True, "OUTPUT": output, "AFFINE": True, **options},
                name=f"dropout_add_norm_backward/{dtype}/{hidden}" + "/output" * output,
                multiples="hidden",
            )
