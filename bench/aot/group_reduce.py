"""Cases of group_reduce: few and all statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot.case import Case, case
from sensikernels.ops.group_reduce.triton import BLOCK, GROUPS, finish_groups, reduce_chunks


def cases() -> Iterator[Case]:
    """The cases, in the order of the tables."""
    run = {"num_warps": 4, "num_stages": 3}
    types = {"descriptors chunks members": "*i64", "partials": "*fp32", "stride": "i64"}
    for mask in (0b1001, 0b11111111):
        yield case(reduce_chunks, types, {"MASK": mask, "BLOCK": BLOCK, **run})
    constants = {"LARGEST": 1, "ORDERED": True, "RUNNING": True, "EMA": True, "GROUPS": GROUPS}
    types = {"starts": "*i64", "order": "*i32", "partials out running ema": "*fp32"}
    types |= {"stride groups": "i64", "decay": "fp32"}
    yield case(finish_groups, types, {**constants, **run})
