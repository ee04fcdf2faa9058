"""The suite's points of ``masked_linear`` and its baselines."""

from __future__ import annotations

from typing import Any

import pytest

from bench.linear_points import measure_point, points_of
from sensikernels.bench.linear_cases import Case

POINTS = points_of(lambda case: case.direction != "grad_weight")


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_masked_linear(point: tuple[Case, str], benchmark: Any, device: str) -> None:
    measure_point(benchmark, point, device)
