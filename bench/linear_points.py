"""Points of the linear suite as tests: one a contestant, gated by correctness there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sensikernels.bench.linear_cases import Case, quick_cases
from sensikernels.bench.linear_runs import contestants, recording


def points_of(wanted: Callable[[Case], bool]) -> dict[str, tuple[Case, str]]:
    """Case and contestant of every quick point, by a name."""
    return {
        f"{_label(case)}-{name}": (case, name)
        for case in quick_cases()
        if wanted(case)
        for name in (*case.candidates, *case.baselines)
    }


def measure_point(benchmark: Any, point: tuple[Case, str], device: str) -> None:
    """Time one contestant, in the group of its case."""
    case, name = point
    run = contestants(case, device)[name]

    def timed() -> object:
        out = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.group = _label(case)
    with recording(case):
        benchmark.pedantic(timed, rounds=10, warmup_rounds=2)


def _label(case: Case) -> str:
    facts = case.facts()
    return f"{facts['case']} {facts['dtype']} {case.direction}".replace(" ", "-")
