"""Cases of the kernels that several operators launch."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case, product_constants
from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.common.triton_gather import (
    GATHER,
    TAKE_KEPT,
    gather_columns_kernel,
    take_kept_kernel,
)
from sensikernels.ops.common.triton_gelu import (
    COLUMN_SUM,
    SUM_PARTIALS,
    column_sum_kernel,
    sum_partials_kernel,
)
from sensikernels.ops.common.triton_sdd import CONFIGS, MOST, block_gradient_kernel


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for dtype in ("bf16", "fp32"):
        yield _gather(dtype)
    for form in ("rows", "columns", "blocks"):
        yield _take_kept(form)
    for dtype in ("bf16", "fp32"):
        yield _column_sum(dtype, gelu=True)
        yield _column_sum(dtype, gelu=False)
        yield case(
            sum_partials_kernel,
            {"partial": "*fp32", "out": f"*{dtype}", "count size": "i32"},
            SUM_PARTIALS.options,
            name=f"sum_partials/{dtype}/{SUM_PARTIALS.name}",
            multiples="size",
        )
    for config in CONFIGS:
        dtype = "fp32" if config.tile["BLOCK_T"] == 32 else "bf16"
        yield _block_gradient(config, dtype, "pointers")
        if dtype == "bf16":
            yield _block_gradient(config, dtype, "grouped")
            yield _block_gradient(config, dtype, "edges")
        if (config.tile["BLOCK_M"], config.tile["BLOCK_N"]) != (32, 128):
            yield _block_gradient(config, dtype, "bulk")


def _gather(dtype: str) -> Case:
    strides = "stride0 stride1 stride2 stride_dst"
    types = {
        "src0 src1 src2 dst": f"*{dtype}",
        "cols0 cols1 cols2": "*i32",
        f"tokens n0 n1 n2 {strides}": "i32",
    }
    name = f"gather_columns/{dtype}/{GATHER.name}"
    return case(gather_columns_kernel, types, GATHER.options, name=name, multiples=strides)


def _take_kept(form: str) -> Case:
    sizes = "out_rows out_cols stride"
    types = {
        "src0 dst0": "*bf16",
        "src1 src2 src3 dst1 dst2 dst3": "*fp32",
        "rows cols block_rows block_cols": "*i32",
        f"count height width tiles_i {sizes}": "i32",
    }
    constants = {
        "COUNT": 4,
        "HAS_ROWS": form == "rows",
        "HAS_COLS": form == "columns",
        "BLOCKS": form == "blocks",
    }
    return case(
        take_kept_kernel,
        types,
        {**constants, **TAKE_KEPT.options},
        name=f"take_kept/{form}/{TAKE_KEPT.name}",
        multiples=sizes,
    )


def _column_sum(dtype: str, *, gelu: bool) -> Case:
    sizes = "width stride_dy stride_pre"
    return case(
        column_sum_kernel,
        {"dy pre dpre": f"*{dtype}", "partial": "*fp32", f"tokens rows_each {sizes}": "i32"},
        {"GELU": gelu, **COLUMN_SUM.options},
        name=f"{'gelu_backward' if gelu else 'column_sum'}/{dtype}/{COLUMN_SUM.name}",
        multiples=sizes,
    )


def _block_gradient(config: launch.Config, dtype: str, form: str) -> Case:
    n, m, t = config.tile.values()
    height, width = m, 32 if m == 32 and n == 128 else n
    sizes = "in_width width0 width1 width2 stride_x stride0 stride1 stride2"
    types = {
        "x dy0 dy1 dy2": f"*{dtype}",
        "out": "*fp32",
        "rows0 rows1 rows2 cols0 cols1 cols2": "*i32",
        f"n0 n1 n2 tokens tokens_each splits {sizes}": "i32",
    }
    if form == "bulk":
        types |= {"x": f"tensordesc<{dtype}[{t}, {n}]>", "dy0": f"tensordesc<{dtype}[{t}, {m}]>"}
    constants = {
        "BM": height,
        "BN": width,
        "TENSORS": MOST if form == "grouped" else 1,
        **product_constants(dtype, form),
    }
    return case(
        block_gradient_kernel,
        types,
        {**constants, **config.options},
        name=f"block_gradient/{dtype}/{height}x{width}/{form}/{config.name}",
        multiples=sizes,
        gemm=True,
        targets={"bulk": launch.BULK, "pointers": launch.POINTERS}.get(form, launch.ONE),
    )
