"""A plan survives the disk, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensikernels._core.errors import CheckpointError
from sensikernels.masks import Budget, Plan, Scores, plan
from tests.masks.conftest import make_scores, make_structure


@pytest.fixture
def made() -> Plan:
    small = {"neurons": 2}
    return plan(make_scores(make_structure()), Budget(flops=0.5), multiples=small, minimums=small)


def test_round_trip(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back.to_json() == made.to_json()
    assert back.couplings == made.couplings
    assert all(made.weight_masks[n].equal(m) for n, m in back.weight_masks.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    assert str(back) == str(made)
    assert "budget flops 0.5" in str(made)


@pytest.mark.parametrize("damage", ["no json", "half json", "no grids", "half grids", "format"])
def test_damage_is_one_clear_error(made: Plan, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    kind, _, what = damage.partition(" ")
    target = path if what != "grids" else path.with_suffix(".safetensors")
    if kind == "no":
        target.unlink()
    elif kind == "half":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    else:
        path.write_text(path.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"plan\.json"):
        Plan.load(path)


def test_scores_must_fit_the_structure() -> None:
    scores = make_scores(make_structure())
    values = {**scores.values, "layer.0.heads": scores.values["layer.0.heads"][:1]}
    with pytest.raises(ValueError, match=r"layer\.0\.heads: expected 3, got 1"):
        Scores(structure=scores.structure, values=values, criterion="x", statistic="x")


def test_tensor_ranking_is_score_per_flop() -> None:
    scores = make_scores(make_structure())
    coupling = scores.structure.couplings[0]
    expected = float(scores.values[coupling.name].double().sum()) / (3 * coupling.units)
    per_unit = coupling.linear_flops + coupling.attention_flops * 10
    assert scores.per_tensor()[coupling.name] == pytest.approx(expected / per_unit)
