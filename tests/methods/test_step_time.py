"""Plans by the clock, with a clock that counts FLOPs: every figure is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import applied, apply, structure_of, training_flops
from sensikernels.masks import Budget, Geometry, Plan, StepCosts
from sensikernels.methods import Run, SensiBert, step_time
from sensikernels.optim import SubsetAdamW
from sensikernels.world import World
from tests.hf.conftest import make_batch, make_model

LAYERS = 4


def make_optimizer(model: nn.Module) -> SubsetAdamW:
    return SubsetAdamW(model.parameters(), lr=0.0)


def world(gather: Callable[[Any], list[Any]], **place: int) -> World:
    """Processes that exist by what they say alone."""

    class Told(World):
        def gather(self, value: Any) -> list[Any]:
            return gather(value)

        def agree(self, make: Callable[[], Any]) -> Any:
            return make()

    return Told(**place)


def three() -> list[dict[str, Tensor]]:
    return [make_batch(seed=i) for i in range(3)]


def make_run(share: float, **named: object) -> Run:
    model = make_model(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=256, dropout=0.1)
    return Run(
        model=model,
        optimizer=SubsetAdamW(model.parameters(), lr=1e-3),
        max_steps=10,
        geometry=Geometry.uniform(9),
        budget=Budget(step_time=share),
        **({"make_optimizer": make_optimizer, "batches": three} | named),  # type: ignore[arg-type]
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds are MFLOPs, plus ``fixed`` for each step of a whole model."""
    extra = {"fixed": 0.0}

    def stepper(
        model: nn.Module, make: object, device: object, gradients: object = None
    ) -> Callable[[object], float]:
        whole = len(model.bert.encoder.layer) == LAYERS  # type: ignore[union-attr, arg-type]
        # Every batch has the same shape, so one count stands for all.
        counted: list[float] = []

        def step(batch: object) -> float:
            if not counted:
                counted.append(training_flops(model, batch) / 1e6)  # type: ignore[arg-type]
            return counted[0] + extra["fixed"] * whole

        return step

    monkeypatch.setattr(step_time, "_stepper", stepper)
    return extra


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_a_true_table_meets_the_budget_at_once(clock: dict[str, float], share: float) -> None:
    run = make_run(share)
    SensiBert(warmup=0).begin_step(run)
    assert run.plan is not None
    assert applied(run.model) is not None
    facts = run.plan.origin["step_time"]
    assert facts["plans"] == 1
    assert facts["asked"] == share
    assert share * 0.98 <= facts["met"] <= share
    assert facts["met"] == pytest.approx(run.plan.flops_ratio, rel=0.02)
    assert run.plan.budget == Budget(step_time=share)
    assert f"step time x{facts['met']:.3f}" in run.events[-1]


def test_what_the_table_does_not_know_is_corrected(clock: dict[str, float]) -> None:
    dense = training_flops(make_run(0.5).model, make_batch()) / 1e6
    run = make_run(0.7)
    run.costs = step_time.measure_costs(run.model, run.batches(), make_optimizer)
    clock["fixed"] = 0.3 * dense  # the table was measured without it
    SensiBert(warmup=0).begin_step(run)
    assert run.plan is not None
    facts = run.plan.origin["step_time"]
    assert 1 < facts["plans"] <= 4
    assert facts["met"] == pytest.approx(0.7, rel=step_time.TOLERANCE)


def test_noise_of_one_timing_does_not_choose_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are 1.1 of the table's; the first is found right by chance of a twentieth."""
    noise = iter([1.05, 0.93, 1.04, 0.96])

    def plans(budget: Budget) -> Plan:
        assert budget.step_time is not None
        return Plan(method="m", origin={"aim": budget.step_time})

    def ratio(dense: nn.Module, planned: Plan, *rest: object, **named: object) -> float:
        return 1.1 * next(noise) * float(aims[-1])

    aims: list[float] = []
    monkeypatch.setattr(step_time, "apply", lambda model, made: aims.append(made.origin["aim"]))
    monkeypatch.setattr(step_time, "time_ratio", ratio)
    run = make_run(0.5)
    found = step_time._corrected(run, plans, Budget(step_time=0.5), 0.5, make_optimizer, [])
    assert len(aims) == found.origin["step_time"]["plans"] == 4
    assert found.origin["aim"] * 1.1 == pytest.approx(0.5, rel=0.02)
    assert found.budget == Budget(step_time=0.5)


def test_a_plan_is_timed_on_batches_of_every_size() -> None:
    def batch(length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(2, length)}

    chosen = step_time._spread([batch(n) for n in (5, 32, *range(1, 5), *range(6, 32))])
    assert [b["input_ids"].shape[1] for b in chosen] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert len(step_time._spread([batch(2), batch(1), batch(3)])) == 3


def test_the_table_knows_position_kind_and_width(clock: dict[str, float]) -> None:
    model = make_run(0.5).model
    costs = step_time.measure_costs(model, [make_batch()], make_optimizer)
    assert costs.layers == LAYERS
    assert costs.units == {"heads": 4, "neurons": 256}
    inner = costs.saved["inner"]["neurons"]
    assert set(inner) == {16, 32, 64, 96, 128, 160, 192, 224, 256}
    assert [inner[w] for w in sorted(inner)] == sorted(inner.values(), reverse=True)
    assert inner[128] == pytest.approx(inner[64] * 2 / 3)
    assert set(costs.saved["last"]["heads"]) == {1, 2, 4}


def test_timing_leaves_the_run_alone() -> None:
    run = make_run(0.9)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    costs = step_time.measure_costs(run.model, run.batches(), make_optimizer, seconds=0.0)
    run.costs = costs
    assert costs.dense_ms > 0
    planned = step_time.by_the_clock(
        run,
        lambda budget: step_time.uniform(
            step_time.structure_of(run.model), {"layer.0.neurons": 16}
        ),
        Budget(step_time=0.9),
    )
    assert planned.budget == Budget(step_time=0.9)
    assert planned.origin["step_time"]["met"] > 0
    assert applied(run.model) is None
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_no_optimizer_to_time_with() -> None:
    with pytest.raises(UsageError, match="make_optimizer"):
        SensiBert(warmup=0).begin_step(make_run(0.5, make_optimizer=None))


def test_of_several_processes_the_slowest_counts(clock: dict[str, float]) -> None:
    dense, planned = make_run(0.5).model, make_run(0.5).model
    widths = {f"layer.{i}.neurons": 64 for i in range(LAYERS)}
    apply(planned, step_time.uniform(structure_of(planned), widths))
    batches = [make_batch()]
    alone = step_time.time_ratio(dense, planned, batches, make_optimizer)
    slow = step_time.time_ratio(
        dense,
        planned,
        batches,
        make_optimizer,
        world=world(lambda own: [own, [2 * own[0], own[1]]]),
    )
    assert slow == pytest.approx(alone / 2)


def test_every_process_times_its_rows_of_the_same_batches() -> None:
    every = [[make_batch(seed=0), make_batch(seed=2)], [make_batch(seed=1)]]
    parts = []
    for rank in range(2):
        run = make_run(0.5, world=world(lambda own: every, rank=rank, size=2))
        parts.append(step_time.own_rows(run))
    for seed, (first, second) in enumerate(zip(*parts, strict=True)):
        whole = make_batch(seed=seed)
        for name, value in whole.items():
            assert torch.equal(first[name], value[::2])
            assert torch.equal(second[name], value[1::2])
    few = make_run(0.5, world=world(lambda own: every, rank=7, size=9))
    assert {len(batch["labels"]) for batch in step_time.own_rows(few)} == {1}


def test_all_take_the_costs_of_the_slowest(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(own: object) -> list[object]:
        slower = isinstance(own, StepCosts)
        return [own, replace(own, dense_ms=own.dense_ms * 2)] if slower else [own]

    run = make_run(0.9, world=world(gather))
    SensiBert(warmup=0).begin_step(run)
    assert run.costs is not None
    mine = step_time.measure_costs(make_run(0.9).model, make_run(0.9).batches(), make_optimizer)
    assert run.costs.dense_ms == pytest.approx(2 * mine.dense_ms)
