"""Cases of select_kept: the passes over |weight times gradient|, and the fill of a budget."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.select_kept import triton as kernels
from sensikernels.ops.select_kept.triton import BINS, FILL, TILE, WARPS


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    run = {"num_warps": WARPS, "num_stages": 3}
    common = {"SCORE": 2, "TILE": TILE, **run}
    digit = {"SCORE": 2, "SHIFT": 10, "WIDTH": 11, "TILE": TILE, "BINS": BINS, **run}
    yield case(kernels._count, {"table tiles keys histogram": "*i64"}, digit)
    yield case(kernels._ties, {"table tiles keys ties": "*i64"}, common)
    yield case(kernels._bits, {"table tiles keys wanted needs before kept": "*i64"}, common)
    types = {
        "cost": "*fp64",
        "segment": "*i64",
        "free": "*u8",
        "left": "*fp64",
        "chosen": "*u8",
        "ended": "*i32",
        "n": "i32",
    }
    yield case(kernels._fill, types, {"PREFIX": True, "FILL": FILL, **run})
