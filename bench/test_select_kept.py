"""``select_kept`` and ``select_elements`` against ``torch.topk`` and ``torch.kthvalue``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest import OURS, contestants, measure
from sensikernels import select_kept
from sensikernels.ops.select_kept import select_elements


@contestants("topk", "kthvalue")
@pytest.mark.parametrize("entries", [1 << 20, 1 << 23])
def test_select_elements(benchmark: Any, device: str, entries: int, name: str) -> None:
    scores, k = torch.rand(entries, device=device), entries // 10

    def ours() -> list[Tensor]:
        return [select_elements([scores], k=k).threshold.view(())]

    runs = {
        OURS: ours,
        "topk": lambda: [torch.topk(scores, k, sorted=False).values.min()],
        "kthvalue": lambda: [torch.kthvalue(scores, entries - k + 1).values],
    }
    measure(benchmark, f"select_elements {entries}", name, runs, tolerance=1e-6)


@contestants("topk")
def test_select_kept(benchmark: Any, device: str, name: str) -> None:
    scores = torch.rand(12 * 3072, device=device)
    k = len(scores) // 2

    def theirs() -> list[Tensor]:
        bits = torch.zeros_like(scores, dtype=torch.bool)
        bits[torch.topk(scores, k, sorted=False).indices] = True
        return [bits.float()]

    runs = {OURS: lambda: [select_kept(scores, k=k).bits.float()], "topk": theirs}
    measure(benchmark, f"select_kept {k} of {len(scores)}", name, runs, tolerance=0.0)
