"""Cases of dropout."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.dropout.triton import CONFIGS, dropout_kernel


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr y_ptr": f"*{dtype}", "seed_ptr": "*i64", "n threshold": "i32"}
        yield case(dropout_kernel, {**types, "scale": "fp32"}, CONFIGS[0])
