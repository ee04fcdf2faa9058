"""Cases of masked_linear: every configuration in each form that launches it."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case, product_constants
from sensikernels.ops.common import triton_launch as launch
from sensikernels.ops.masked_linear import triton_blocks, triton_compact

BLOCK_TARGETS = {
    "forward": launch.POINTERS,
    "input": launch.POINTERS[:2],
    "forward-bulk": launch.BULK,
    "exact": launch.POINTERS[:1],
}

COMPACT_TARGETS = {
    "direct": launch.POINTERS,
    "scatter": launch.POINTERS[:2],
    "direct-bulk": launch.BULK,
}


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    for config in triton_blocks.CONFIGS:
        short = config.tile["BLOCK_K"] == 32
        for form in ("forward",) if short else ("forward", "input", "forward-bulk", "input-bulk"):
            yield _blocks(config, "bf16", form)
        if short:
            yield _blocks(config, "fp32", "forward-bulk")
            yield _blocks(config, "fp32", "input-bulk")
            if config.sums_per_thread <= 32:
                yield _blocks(config, "fp32", "exact")
        elif config.tile["BLOCK_T"] == 128:
            yield _blocks(config, "bf16", "forward-edges")
    for config in triton_compact.CONFIGS:
        dtype = "fp32" if config.tile["BLOCK_K"] == 32 else "bf16"
        forms = ["direct", "direct-bulk"]
        if config.tile["BLOCK_O"] < 128:
            forms += ["scatter", "scatter-bulk", "input", "input-bulk"]
        for form in forms + ["direct-edges"] * (dtype == "bf16"):
            yield _compact(config, dtype, form)


def _tiles(config: launch.Config, dtype: str, *, transposed: bool) -> dict[str, str]:
    """The types of a tile of the input and of the weight where both come by bulk copies."""
    t, o, k = config.tile.values()
    weight = f"{k}, {o}" if transposed else f"{o}, {k}"
    return {"x": f"tensordesc<{dtype}[{t}, {k}]>", "w": f"tensordesc<{dtype}[{weight}]>"}


def _blocks(config: launch.Config, dtype: str, form: str) -> Case:
    _, o, k = config.tile.values()
    transposed, bulk = form.startswith("input"), form.endswith("bulk")
    height, width = (k, o) if transposed else (o, k)
    sizes = "in_width out_width stride_x"
    types = {
        "x values bias y pre": f"*{dtype}",
        "ptr idx perm order": "*i32",
        f"tokens lines {sizes}": "i32",
    }
    if bulk:
        tiles = _tiles(config, dtype, transposed=transposed)
        types |= {"x": tiles["x"], "values": tiles["w"]}
    constants = {
        "BM": height,
        "BN": width,
        "TRANSPOSED": transposed,
        "HAS_BIAS": not transposed,
        "GELU": not transposed,
        **product_constants(dtype, form),
    }
    return case(
        triton_blocks.block_linear_kernel,
        types,
        {**constants, **config.options},
        name=f"block_linear/{dtype}/{height}x{width}/{form}/{config.name}",
        multiples=sizes,
        gemm=True,
        wgmma=form != "exact",
        targets=BLOCK_TARGETS.get(form, launch.ONE),
    )


def _compact(config: launch.Config, dtype: str, form: str) -> Case:
    inner_first, bulk = form.startswith("input"), form.endswith("bulk")
    sizes = "inner out_width stride_x stride_w" + " kept" * inner_first
    types = {
        "x w bias y pre": f"*{dtype}",
        "scatter": "*i32",
        "tokens steps kept inner out_width stride_x stride_w": "i32",
    }
    if bulk:
        types |= _tiles(config, dtype, transposed=inner_first)
    constants = {
        "SCATTER": form.startswith(("scatter", "input")),
        "INNER_FIRST": inner_first,
        "HAS_BIAS": not inner_first,
        "GELU": not inner_first,
        **product_constants(dtype, form),
    }
    return case(
        triton_compact.compact_linear_kernel,
        types,
        {**constants, **config.options},
        name=f"compact_linear/{dtype}/{form}/{config.name}",
        multiples=sizes,
        gemm=True,
        targets=COMPACT_TARGETS.get(form, launch.ONE),
    )
