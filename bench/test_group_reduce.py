"""``group_reduce`` over a BERT's tensors against the recipes of ``sensikernels.bench``."""

from __future__ import annotations

from typing import Any

import torch

from bench.contest import OURS, contestants, measure
from sensikernels import group_reduce
from sensikernels.bench.reductions import STATISTICS, bert_shapes, foreach, loop, loop_reused
from sensikernels.ops.group_reduce import GroupTable


@contestants("loop", "loop-reused", "foreach")
def test_group_reduce(benchmark: Any, device: str, name: str) -> None:
    shapes = bert_shapes(256, 1024, 4)
    weights = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    table = GroupTable(weights, grads, groups="row")
    reuse = loop_reused(weights, grads)

    def ours() -> list[torch.Tensor]:
        sums = group_reduce(weights, grads, STATISTICS, table=table)
        return [sums.view(s, i) for i in range(len(weights)) for s in STATISTICS]

    runs = {
        OURS: ours,
        "loop": lambda: loop(weights, grads),
        "loop-reused": reuse,
        "foreach": lambda: foreach(weights, grads),
    }
    # The foreach recipe knows no row sums: it is here for its time alone.
    group = f"group_reduce {len(weights)} tensors"
    measure(benchmark, group, name, runs, tolerance=None if name == "foreach" else 1e-3)
