"""Cases of selective_linear: the gradient of kept rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.aot.case import Case, case, product_constants
from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.selective_linear.triton_rows import CONFIGS, row_gradient_kernel


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for config, form in product(CONFIGS, ("pointers", "bulk", "edges")):
        yield _rows(config, "fp32" if config.tile["BLOCK_T"] == 32 else "bf16", form)


def _rows(config: launch.Config, dtype: str, form: str) -> Case:
    m, n, t = config.tile.values()
    sizes = "readable width stride_dy stride_x"
    types = {
        "dy x": f"*{dtype}",
        "out": "*fp32",
        f"tokens tokens_each splits rows {sizes}": "i32",
    }
    if form == "bulk":
        types |= {"dy": f"tensordesc<{dtype}[{t}, {m}]>", "x": f"tensordesc<{dtype}[{t}, {n}]>"}
    return case(
        row_gradient_kernel,
        types,
        {**product_constants(dtype, form), **config.options},
        name=f"row_gradient/{dtype}/{form}/{config.name}",
        multiples=sizes,
        gemm=True,
        targets={"bulk": launch.BULK, "pointers": launch.POINTERS}.get(form, launch.ONE),
    )
