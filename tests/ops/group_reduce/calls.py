"""Right calls of the sums over groups, and their step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sensikernels import group_reduce
from sensikernels.ops.group_reduce import GroupTable, per_sample_grad_squared
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, operator
from tests.ops.inputs import floats, ints


def operators() -> Iterator[RightCall]:
    weights = [floats(4, 6), floats(5)]
    ids = ints(0, 1, 1, -1, 0, dtype=torch.int32)
    table = GroupTable(weights, weights, groups=[("block", 2, 3), ("ids", ids, 2)])
    yield _reduction("group_reduce", table, weights)
    strided = [floats(8, 6)[::2], floats(5)]
    rows = GroupTable(strided, strided, groups="row")
    yield _reduction("group_reduce/rows", rows, strided)


def _reduction(name: str, table: GroupTable, weights: list[Tensor]) -> RightCall:
    groups = table.layout.groups
    # No gradients: the weights stand in for them. A table may end early, or repeat itself.
    accepts = [
        "grads:none",
        "chunks:shorter",
        "chunks:longer",
        "members:longer",
        "partials:wide",
        "starts:0",
        *(["order", "members"] if not table.order.numel() else []),
    ]
    return operator(
        "group_reduce",
        name,
        weights=weights,
        grads=weights,
        flat=list(table.layout.flat),
        chunks=table.chunks,
        starts=table.starts,
        order=table.order,
        members=table.members,
        host_descriptors=table.host_descriptors,
        descriptors=None,
        partials=table.partials(2),
        statistics=3,
        running=torch.zeros(2, groups),
        ema=torch.zeros(2, groups),
        decay=0.5,
        backend="native",
        indices=["chunks", "starts", "order", "members"],
        accepts=accepts,
    )


def functions() -> Iterator[RightCall]:
    weights = [floats(4, 6), floats(5)]
    ids = ints(0, 1, 1, -1, 0, dtype=torch.int32)

    def by_ids(ids: Tensor, backend: str) -> Any:
        groups = [("block", 2, 3), ("ids", ids, 2)]
        return group_reduce(weights, weights, ["sum_wg"], groups=groups, backend=backend)

    for backend in BACKENDS:
        wide = [f"{name}:{i}-wider" for name in ("weights", "grads") for i in range(2)]
        yield function(
            f"group_reduce/{backend}",
            group_reduce,
            accepts=[
                "statistics:shorter",
                "statistics:longer",
                *(wide if backend == "reference" else []),
            ],
            weights=weights,
            grads=weights,
            statistics=["sum_abs_wg", "max_abs_grad"],
            groups="row",
            backend=backend,
        )
        name = f"group_reduce/{backend}/ids"
        yield function(name, by_ids, indices=["ids"], ids=ids, backend=backend)
    sizes = [f"{name}:{how}" for name in ("x", "grad_y") for how in ("wide", "narrow", "wider")]
    given = {"x": floats(2, 3, 4), "grad_y": floats(2, 3, 5), "groups": "row", "accepts": sizes}
    yield function("per_sample_grad_squared", per_sample_grad_squared, **given)


def step(backend: str, device: str) -> list[Tensor]:
    weights, grads = ([torch.randn(s, device=device) for s in ((67, 130), (129,))] for _ in "wg")
    names = ("sum_abs_wg", "sum_batch_grad_squared", "max_abs_grad")
    sums = group_reduce(weights, grads, names, groups="row", backend=backend)
    return [sums.flat(name) for name in names]


STEP = Step("group_reduce", step, native=("cpu", "cuda"))
CALLS = Calls(operators=operators, functions=functions, by_address=("group_reduce",), steps=(STEP,))
