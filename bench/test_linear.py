"""The suite's cases under pytest-benchmark: ``pytest bench/test_linear.py``."""

from __future__ import annotations

from typing import Any

import pytest

from sensikernels.bench.linear_cases import Case, quick_cases
from sensikernels.bench.linear_runs import contestants, recording

DEVICE = "cpu"
POINTS = [(case, name) for case in quick_cases() for name in (*case.candidates, *case.baselines)]


def label(point: tuple[Case, str]) -> str:
    case, name = point
    facts = case.facts()
    return f"{facts['case']} {facts['dtype']} {case.direction} {name}".replace(" ", "-")


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_linear(point: tuple[Case, str], benchmark: Any) -> None:
    case, name = point
    run = contestants(case, DEVICE)[name]
    benchmark.group = label((case, ""))
    with recording(case):
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
