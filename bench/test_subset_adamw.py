"""``SubsetAdamW`` over a BERT's tensors against torch's AdamW, fused and foreach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest import OURS, contestants, measure
from sensikernels.bench.optimizer import LR, bert_shapes, parameters, subset


@contestants("adamw-fused", "adamw-foreach")
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_subset_adamw(benchmark: Any, device: str, density: float, name: str) -> None:
    shapes = bert_shapes(layers=2, wide=384, vocabulary=8000)

    def ours() -> list[Tensor]:
        optimizer.step()
        return [params[0].detach()]

    torch.manual_seed(0)
    params = parameters(shapes, torch.float32, device)
    if name == OURS:
        optimizer: torch.optim.Optimizer = subset(params, "rows", density)
    else:
        fused = name == "adamw-fused"
        optimizer = torch.optim.AdamW(params, lr=LR, fused=fused, foreach=not fused)
    # Each step moves on, so runs are not compared here: the suite's ``check`` does that.
    group = f"subset_adamw {len(params)} tensors, rows {density:g}"
    measure(benchmark, group, name, {OURS: ours, name: ours}, tolerance=None)
