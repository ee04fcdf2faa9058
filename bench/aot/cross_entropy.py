"""Cases of cross_entropy: BERT's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.cross_entropy.triton import (
    MEAN,
    cross_entropy_backward_kernel,
    cross_entropy_kernel,
    mean_kernel,
    row_options,
)


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    options = row_options(30522)
    for dtype in ("bf16", "fp32"):
        types = {"x": f"*{dtype}", "labels": "*i64", "stats": "*fp32", "classes ignored": "i32"}
        yield case(
            cross_entropy_kernel,
            {**types, "losses": "*fp32"},
            options,
            name=f"cross_entropy/{dtype}/{options['BLOCK']}",
        )
        yield case(
            cross_entropy_backward_kernel,
            {**types, "dloss scale": "*fp32", "dx": f"*{dtype}"},
            options,
            name=f"cross_entropy_backward/{dtype}/{options['BLOCK']}",
        )
    yield case(
        mean_kernel,
        {"losses loss scale": "*fp32", "labels": "*i64", "rows ignored": "i32"},
        MEAN.options,
        name=f"cross_entropy_mean/{MEAN.name}",
    )
