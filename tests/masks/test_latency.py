"""Step-time budgets: the best widths under a table of costs, and the table's own laws."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import DataError, UsageError
from sensikernels.masks import Budget, Plan, Scores, StepCosts, plan, uniform
from tests.masks.conftest import make_scores, make_structure

SMALL = {"neurons": 2, "heads": 1}
HEADS, NEURONS = 3, 8


def make_costs(*, seed: int = 0, layers: int = 2, staircase: bool = False) -> StepCosts:
    """A table in which every width has a cost of its own, falling with the width."""
    rng = np.random.default_rng(seed)

    def falling(units: int) -> dict[int, float]:
        steps = rng.random(units - 1) * 40 / units
        return {units: 0.0} | {units - 1 - i: float(s) for i, s in enumerate(np.cumsum(steps))}

    saved = {
        where: {"heads": falling(HEADS), "neurons": falling(NEURONS)} for where in ("inner", "last")
    }
    return StepCosts(
        device="cpu",
        dtype="float32",
        threads=1,
        tokens=10,
        layers=layers,
        units={"heads": HEADS, "neurons": NEURONS},
        dense_ms=100.0,
        saved=saved,
        staircase=staircase,
    )


def share(costs: StepCosts, made: Plan) -> float:
    kept = made.kept_counts()
    return 1 - sum(float(costs.share_saved(c, np.array([kept[c.name]]))[0]) for c in made.couplings)


def value(scores: Scores, kept: dict[str, int]) -> float:
    return sum(
        float(scores.values[name].double().sort(descending=True).values[:n].sum())
        for name, n in kept.items()
    )


@given(seed=st.integers(0, 500), asked=st.floats(0.85, 1.0))
def test_no_widths_within_the_time_score_higher(seed: int, asked: float) -> None:
    structure = make_structure(heads=HEADS, neurons=NEURONS)
    scores, costs = make_scores(structure, seed), make_costs(seed=seed)
    budget = Budget(step_time=asked)
    made = plan(scores, budget, costs=costs, multiples=SMALL, minimums=SMALL)
    assert share(costs, made) <= asked + 1e-9
    choices = [range(SMALL[c.kind], c.units + 1, SMALL[c.kind]) for c in structure.couplings]
    best = 0.0
    for counts in product(*choices):
        kept = {c.name: n for c, n in zip(structure.couplings, counts, strict=True)}
        # What the discretised time may lose is left out of the comparison.
        if share(costs, uniform(structure, kept)) <= asked - 1e-3:
            best = max(best, value(scores, kept))
    assert value(scores, made.kept_counts()) >= best - 1e-9


def test_the_best_units_are_kept() -> None:
    scores = make_scores(make_structure(heads=HEADS, neurons=NEURONS))
    made = plan(scores, Budget(step_time=0.85), costs=make_costs(), multiples=SMALL)
    for coupling in made.couplings:
        kept = made.kept_units(coupling)
        values = scores.values[coupling.name]
        assert int(kept.sum()) < coupling.units or values[kept].numel() == coupling.units
        if not kept.all():
            assert values[kept].min() >= values[~kept].max()


def table_of(points: dict[str, dict[int, float]], **facts: Any) -> StepCosts:
    """Costs of two layers of ``HEADS`` heads and ``NEURONS`` neurons that save the same."""
    same = {"dtype": "float32", "tokens": 1, "layers": 2}
    units, saved = {"heads": HEADS, "neurons": NEURONS}, {"inner": points, "last": points}
    return StepCosts(**same, units=units, saved=saved, **facts)


def test_a_staircase_takes_the_widest_of_equal_cost() -> None:
    coupling = make_structure(heads=HEADS, neurons=NEURONS).couplings[1]
    points = {"heads": {3: 0.0}, "neurons": {8: 0.0, 4: 10.0}}
    steps = table_of(points, device="cuda", threads=0, dense_ms=100.0, staircase=True)
    assert steps.share_saved(coupling, np.arange(1, 9)).tolist() == [0.1] * 4 + [0.0] * 4


def test_noise_leaves_costs_falling() -> None:
    coupling = make_structure(heads=HEADS, neurons=NEURONS).couplings[1]
    points = {"heads": {3: 0.0}, "neurons": {8: 0.0, 6: -3.0, 4: 9.0, 2: 4.0}}
    table = table_of(points, device="cpu", threads=1, dense_ms=10.0)
    saved = table.share_saved(coupling, np.arange(1, 9))
    assert (np.diff(saved) <= 0).all()
    assert saved[-1] == 0


def test_what_cannot_be_is_said() -> None:
    scores = make_scores(make_structure(heads=HEADS, neurons=NEURONS))
    with pytest.raises(UsageError, match="costs: expected measured"):
        plan(scores, Budget(step_time=0.5), multiples=SMALL)
    with pytest.raises(UsageError, match=r"step_time: expected at least 0\.\d+ \(the smallest"):
        plan(scores, Budget(step_time=0.01), costs=make_costs(), multiples=SMALL)
    with pytest.raises(UsageError, match="scope"):
        Budget(step_time=0.9, scope="per_layer")
    with pytest.raises(UsageError, match="costs: expected a table for"):
        make_costs().check(scores.structure, "cuda", "float32")
    make_costs().check(scores.structure, "cpu", "float32")


def test_round_trip_and_files_that_are_not_tables(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs = make_costs()
    costs.save(path)
    assert StepCosts.load(path) == costs
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]
    path.write_text('{"saved": 1}')
    with pytest.raises(DataError, match="a table of step costs"):
        StepCosts.load(path)
