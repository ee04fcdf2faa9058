"""Cases of embed_norm: the widths of BERTs."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.common.triton_norm import row_options
from sensikernels.ops.embed_norm.triton import (
    ADD_ROWS,
    add_rows_kernel,
    embed_norm_backward_kernel,
    embed_norm_kernel,
)


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for dtype in ("bf16", "fp32"):
        yield case(
            add_rows_kernel,
            {
                "rows": f"*{dtype}",
                "index": "*i64",
                "partial": "*fp32",
                "tokens tokens_each hidden": "i32",
            },
            ADD_ROWS.options,
            name=f"add_rows/{dtype}/{ADD_ROWS.name}",
            multiples="hidden",
        )
        for hidden in (384, 768, 1024):
            yield from _rows(dtype, hidden)


def _rows(dtype: str, hidden: int) -> Iterator[Case]:
    types = {
        "id0 id1 id2 seed": "*i64",
        "table0 table1 table2": f"*{dtype}",
        "weight moments": "*fp32",
        "rows0 rows1 rows2 hidden threshold": "i32",
        "scale": "fp32",
    }
    options = row_options(hidden)
    yield case(
        embed_norm_kernel,
        {**types, "y": f"*{dtype}", "bias": "*fp32", "eps": "fp32"},
        {"DROPS": True, **options},
        name=f"embed_norm/{dtype}/{hidden}",
        multiples="hidden",
    )
    yield case(
        embed_norm_backward_kernel,
        {**types, "dy dsum": f"*{dtype}", "partial": "*fp32", "tokens tokens_each": "i32"},
        {"DROPS": True, "AFFINE": True, **options},
        name=f"embed_norm_backward/{dtype}/{hidden}",
        multiples="hidden",
    )
