"""Sensi-BERT trims once, at the end of its warm-up, to the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.hf import applied, structure_of
from sensikernels.hf.criteria import StepScores
from sensikernels.masks import Budget, Geometry
from sensikernels.methods import METHODS, Run, SensiBert, method
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model

SMALL = {"neurons": 2}


def make_run(**named: object) -> Run:
    model = make_model(intermediate_size=64)
    return Run(
        model=model,
        optimizer=SubsetAdamW(model.parameters(), lr=1e-3),
        batches=lambda: [make_batch()],
        geometry=Geometry.uniform(9),
        **{"max_steps": 10, "budget": Budget(flops=0.6), **named},  # type: ignore[arg-type]
    )


def train(chosen: SensiBert, run: Run, steps: int) -> None:
    chosen.begin(run)
    for step in range(steps):
        run.step = step
        chosen.begin_step(run)
        run.model(**make_batch(seed=step)).loss.backward()
        chosen.before_step(run)
        run.optimizer.step()
        run.optimizer.zero_grad()


@pytest.mark.parametrize("ranking", ["ranked", "uniform", "random", "reversed"])
def test_trims_when_the_warm_up_ends(ranking: str) -> None:
    run, chosen = make_run(), SensiBert(warmup=0.3, ranking=ranking, multiples=SMALL)
    train(chosen, run, 3)
    assert run.plan is None
    train(chosen, run, 5)
    assert run.plan is not None
    assert applied(run.model) is not None
    assert run.plan.flops_ratio <= 0.6
    assert len(run.events) == 1
    if ranking == "uniform":
        counts = list(run.plan.kept_counts().values())
        assert counts[:2] == counts[2:]


def test_the_rate_rises_again_after_the_trim() -> None:
    run, chosen = make_run(max_steps=20), SensiBert(warmup=0.3, rewarm=0.25, multiples=SMALL)
    chosen.begin(run)
    factors = []
    for run.step in range(20):
        chosen.begin_step(run)
        factors.append(chosen.rate_factor(run))
    assert factors == [*[1] * 6, *[pytest.approx(k / 5) for k in range(1, 6)], *[1] * 9]
    assert run.trimmed_at == 6
    for rewarm in (0.0, 0.05):
        assert SensiBert(rewarm=rewarm).rate_factor(run) == 1
    run.trimmed_at, run.step = None, 6
    assert chosen.rate_factor(run) == 1  # another run trimmed
    with pytest.raises(UsageError, match="rewarm: expected a share"):
        SensiBert(rewarm=1.5)


def test_resume_trims_at_once() -> None:
    run = make_run()
    train(SensiBert(warmup=0.0, multiples=SMALL), run, 1)
    fresh = make_run(plan=run.plan, step=1)
    SensiBert(multiples=SMALL).resume(fresh, {})
    assert {n: p.shape for n, p in fresh.model.named_parameters()} == {
        n: p.shape for n, p in run.model.named_parameters()
    }
    fresh.model.load_state_dict(run.model.state_dict())
    for (_, got), (_, wanted) in zip(
        fresh.model.named_parameters(), run.model.named_parameters(), strict=True
    ):
        assert torch.equal(got, wanted)


def test_needs_a_budget_and_known_options() -> None:
    run = make_run()
    run.budget = None
    with pytest.raises(UsageError, match="budget: expected one for method sensi-bert"):
        train(SensiBert(warmup=0.0), run, 1)
    with pytest.raises(UsageError, match="ranking: expected one of random"):
        SensiBert(ranking="best")
    with pytest.raises(UsageError, match="warmup"):
        SensiBert(warmup=1.0)


def test_methods_by_name() -> None:
    names = "autofreeze bitfit child-tuning dense dps dsee far fewer-layers freeze green-trainer"
    names += " grow lisa lnsr lora s2ft sensi-bert sift smt"
    assert sorted(METHODS) == names.split()
    assert method("bitfit", subsets=["query"]).options() == {"subsets": ("query",)}
    with pytest.raises(UsageError, match="method: expected one of autofreeze, bitfit"):
        method("nothing")


@pytest.mark.parametrize("ranking", ["ranked", "random", "reversed"])
def test_warm_up_steps_rank_without_a_pass(ranking: str) -> None:
    """The scores are the sums of what each step's weight gradients give; no row is read."""
    run = make_run(budget=Budget(flops=0.7))
    run.batches = lambda: pytest.fail("a pass over the ranking rows")
    used = SensiBert(warmup=0.3, ranking=ranking, ranked_on="steps")
    seen = StepScores(run.model, structure_of(run.model))
    used.begin(run)
    for step in range(run.max_steps):
        run.step = step
        used.begin_step(run)
        assert (used.needs_eager() is None) == (step >= 3)
        run.model(**make_batch(seed=step)).loss.backward()
        if run.plan is None:
            seen.add()
        used.before_step(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if step >= 4:
            break
    assert run.scores is not None
    assert run.plan is not None
    wanted = seen.scores(9.0)
    wanted = {"random": wanted.random(0), "reversed": wanted.reversed()}.get(ranking, wanted)
    assert run.scores.criterion == wanted.criterion
    for name, value in wanted.values.items():
        torch.testing.assert_close(run.scores.values[name], value, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"ranked_on": "rows"},
        {"criterion": "first-order"},
        {"statistic": "sum_grad_squared"},
        {"ranking": "uniform"},
        {"warmup": 0.0},
    ],
)
def test_other_rankings_read_the_rows(options: dict[str, Any]) -> None:
    run = make_run(budget=Budget(flops=0.7))
    read: list[int] = []
    batches = run.batches
    run.batches = lambda: read.append(run.step) or batches()  # type: ignore[func-returns-value]
    train(SensiBert(**{"warmup": 0.3, "ranked_on": "steps", **options}), run, 5)
    assert read == [0 if options.get("warmup") == 0.0 else 3]
    assert run.plan is not None


@pytest.mark.parametrize("what", ["frozen", "not finite"])
def test_gradients_that_say_nothing_leave_the_ranking_to_the_rows(what: str) -> None:
    """Frozen weights get none, and steps that are not finite are left out."""
    run = make_run(budget=Budget(flops=0.7))
    weight = run.model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    if what == "frozen":
        weight.requires_grad_(False)
    read: list[int] = []
    batches = run.batches
    run.batches = lambda: read.append(run.step) or batches()  # type: ignore[func-returns-value]
    used = SensiBert(warmup=0.3, ranked_on="steps")
    used.begin(run)
    for step in range(4):
        run.step = step
        used.begin_step(run)
        run.model(**make_batch(seed=step)).loss.backward()
        if what == "not finite" and run.plan is None:
            assert weight.grad is not None
            weight.grad[0, 0] = float("nan")
        used.before_step(run)
        run.optimizer.zero_grad()
    assert read == [3]
    assert run.scores is not None
    assert all(values.isfinite().all() for values in run.scores.values.values())


def test_tensors_keep_shares_and_need_a_share() -> None:
    run = make_run(budget=Budget(flops=0.7))
    train(SensiBert(warmup=0.3, allocation="tensors"), run, 5)
    assert run.plan is not None
    assert run.plan.flops_ratio <= 0.7
    with pytest.raises(UsageError, match="^allocation: expected units for a budget of units"):
        SensiBert(allocation="tensors").begin(make_run(budget=Budget(units={"heads": 4})))
