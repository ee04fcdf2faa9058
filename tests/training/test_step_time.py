"""A run under a step-time budget: asked, met, reported; with a table and without."""

from __future__ import annotations

import json
from functools import partial

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.masks import Budget, Plan, StepCosts
from sensikernels.methods import step_time
from sensikernels.training import finetune, loop, step_costs
from tests.training.processes import run_together


@pytest.fixture
def few_rounds(monkeypatch):
    """A quick table of costs, for tests that do not read its figures."""
    quick = partial(step_time.measure_costs, seconds=0.0)
    for module in (step_time, loop):
        monkeypatch.setattr(module, "measure_costs", quick)


def known(table, *, heads=10.0, neurons=20.0, dense=100.0):
    """The table with milliseconds saved as given: on a model this small noise is larger."""
    saved = {"heads": {1: heads, 4: 0.0}, "neurons": {16: neurons, 128: 0.0}}
    figures = {"dense_ms": dense, "saved": {"inner": saved, "last": saved}}
    return StepCosts(**{**table.to_json(), **figures})


@pytest.fixture
def costs(settings, few_rounds, tmp_path):
    """A table that says what widths save."""
    table = step_costs(settings(method="dense", budget=None), lambda line: None)
    path = tmp_path / "costs.json"
    known(table).save(path)
    return path


def test_asked_and_met_are_reported(settings, costs, tmp_path):
    asked = Budget(step_time=0.9)
    common = {"budget": asked, "max_train_samples": 64, "output": tmp_path / "run"}
    report = finetune(settings(**common, costs=costs))
    budget = report["budget"]
    assert (budget["measure"], budget["requested"]) == ("step_time", 0.9)
    assert budget["step_time_ratio_measured"] > 0
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.budget == asked
    assert plan.origin["step_time"]["asked"] == 0.9
    assert plan.origin["step_time"]["met"] > 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["budget"] == budget


def test_the_benchmark_times_the_plan_beside_the_dense_step(settings, costs):
    from sensikernels.bench.step_time import measure

    asked = {"budget": Budget(step_time=0.9), "costs": costs, "device": "cpu"}
    made = measure(settings(**asked, max_train_samples=64), 3)
    assert (made.candidate, made.baseline, made.n) == ("step-time-0.9", "dense", 3)
    assert made.extra["asked"] == made.density == 0.9
    assert made.extra["flops_ratio"] < 1
    assert made.extra["met"] > 0


def test_without_a_table_the_run_measures_one(settings, few_rounds):
    report = finetune(settings(budget=Budget(step_time=1.0), max_train_samples=64))
    assert report["budget"]["step_time_ratio_measured"] > 0
    assert report["seconds"]["planned"]["rank"] > 0


def test_other_budgets_are_not_timed(settings):
    report = finetune(settings(max_train_samples=64))
    assert report["budget"]["step_time_ratio_measured"] is None


def test_a_table_of_another_model_is_refused_before_training(settings, few_rounds, tmp_path):
    table = step_costs(settings(method="dense", budget=None), lambda line: None)
    path = tmp_path / "costs.json"
    StepCosts(**{**table.to_json(), "dtype": "bfloat16"}).save(path)
    with pytest.raises(UsageError, match="costs: expected a table for"):
        finetune(settings(budget=Budget(step_time=0.5), costs=path))
    with pytest.raises(UsageError, match="costs: expected none without a step_time budget"):
        settings(costs=path)
    with pytest.raises(UsageError, match="granularity"):
        finetune(settings(budget=Budget(step_time=0.5), options={"granularity": "dimensions"}))


def each_its_own_figures(rank):
    """The first process finds that heads alone save time, the slower second one that neurons do."""
    figures = [{"neurons": 0.0}, {"heads": 0.0, "dense": 101.0}][rank]
    measure = step_time.measure_costs
    step_time.measure_costs = lambda *given: known(measure(*given, seconds=0.0), **figures)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_measure_together_and_take_the_slowest_ones_plan(
    settings, tmp_path, parallel
):
    asked = Budget(step_time=0.9)
    output = tmp_path / "two"
    two = settings(budget=asked, max_train_samples=64, output=output, parallel=parallel)
    # A run ends with an error where plans differ.
    assert run_together(two, prepare=each_its_own_figures) == [0, 0]
    report = json.loads((output / "report.json").read_text())
    assert report["numerics"]["processes"] == 2
    assert (report["budget"]["measure"], report["budget"]["requested"]) == ("step_time", 0.9)
    assert report["budget"]["step_time_ratio_measured"] > 0
    plan = Plan.load(output / "plan.json")
    facts = plan.origin["step_time"]
    assert facts["asked"] == 0.9
    assert facts["met"] > 0
    kept = {c.name: int(plan.kept_units(c).sum()) for c in plan.couplings}
    assert {n for name, n in kept.items() if "heads" in name} == {4}
    assert min(n for name, n in kept.items() if "neurons" in name) < 128
    assert any("step time x" in event for event in report["events"])
