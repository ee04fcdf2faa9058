"""GreenTrainer: importances in plain torch, the choice by brute force, the budget as measured."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.hf.trained_flops import TrainedFlops, Unit
from sensikernels.methods import Method, Run
from sensikernels.methods.green_trainer import GreenTrainer, choose, importances
from sensikernels.methods.trained import head_of, names_of, train_only
from sensikernels.optim import SubsetAdamW
from tests.methods.test_trained import (
    assert_costs_as_planned,
    assert_resumes,
    draw,
    make_run,
    moved,
    step,
    tensors_of,
)


def best_by_brute_force(
    costs: TrainedFlops, head: tuple[str, ...], units: list[Unit], worth: list[float], most: float
) -> float:
    """The highest importance of any set of units whose step costs at most ``most``."""
    best = 0.0
    for bits in itertools.product((False, True), repeat=len(units)):
        names = [n for unit, bit in zip(units, bits, strict=True) if bit for n in unit.names]
        if costs.total((*head, *names)) <= most:
            best = max(best, sum(w for w, bit in zip(worth, bits, strict=True) if bit))
    return best


@pytest.mark.parametrize("share", [0.4, 0.55, 0.7, 0.9, 1.0])
def test_the_choice_is_the_best_of_all(share: float) -> None:
    """Of the linears of one layer and of what lies around it, as their true costs are."""
    run = make_run(layers=1, packed=False)
    costs, head = TrainedFlops.of(run.model, run.geometry), head_of(run.model)
    torch.manual_seed(int(share * 100))
    chain = costs.chain(above=head)
    few = {n for unit in chain for n in unit.names if n.endswith("weight") and "Norm" not in n}
    importance = {name: float(torch.randn(())) for name in few}
    dense = costs.total(names_of(run.model))
    budget = share * dense - costs.total(head)
    chosen = choose(chain, importance, budget)
    assert costs.total((*head, *chosen)) <= share * dense * (1 + 1e-9)
    units = [unit for unit in chain if few & set(unit.names)]
    assert len(units) <= 12
    worth = [sum(importance[n] for n in unit.names) for unit in units]
    best = best_by_brute_force(costs, head, units, worth, share * dense * (1 - 1e-3))
    assert sum(importance[name] for name in chosen) >= best - 1e-9
    most = best_by_brute_force(costs, head, units, worth, share * dense)
    assert sum(importance[name] for name in chosen) <= most + 1e-9


def by_torch(run: Run, batch: dict[str, Tensor]) -> dict[str, float]:
    """−Σ Δw·g of one step of torch's AdamW from the run's own moments."""
    if isinstance(run.optimizer, SubsetAdamW):
        run.optimizer.flush()
    model: Any = copy.deepcopy(run.model).eval()
    model.get_input_embeddings().sparse = False
    params = dict(model.named_parameters())
    place = {id(p): name for name, p in run.model.named_parameters()}
    groups = [
        {
            "params": [params[place[id(p)]] for p in group["params"]],
            "weight_decay": group["weight_decay"],
        }
        for group in run.optimizer.param_groups
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for name, parameter in run.model.named_parameters():
        own = run.optimizer.state.get(parameter, {})
        kept = {k: own[k].clone() for k in ("step", "exp_avg", "exp_avg_sq") if k in own}
        if kept:
            optimizer.state[params[name]] = kept
    before = {name: p.detach().clone() for name, p in params.items()}
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    return {n: -float(((p.detach() - before[n]) * p.grad).sum()) for n, p in params.items()}


@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("optimizer", [SubsetAdamW, torch.optim.AdamW])
def test_importances_are_those_of_a_plain_step(optimizer: Any, trained: int) -> None:
    run = make_run(layers=2, optimizer=optimizer, dropout=0.3)
    for number in range(trained):
        step(Method(), run, number)
    got, want = importances(run, draw(50), 1e-3), by_torch(run, draw(50))
    assert got.keys() == want.keys()
    largest = max(map(abs, want.values()))
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=1e-5 * largest), name


def test_importances_of_a_small_step_add_up_to_what_the_loss_falls_by() -> None:
    run = make_run(layers=2)
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-5
    got, model = importances(run, draw(50), 1e-3), run.model.eval()
    before = float(model(**draw(50)).loss.detach())
    model(**draw(50)).loss.backward()
    run.optimizer.step()
    after = float(model(**draw(50)).loss.detach())
    assert sum(got.values()) == pytest.approx(before - after, rel=0.05)
    assert before > after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_leaves_no_trace(dtype: torch.dtype) -> None:
    run = make_run(dtype=dtype, dropout=0.3)
    for number in range(2):
        step(GreenTrainer(share=1.0, selections=1), run, number)
    train_only(run, names_of(run.model), method="x")
    run.model.get_parameter("classifier.bias").grad = torch.ones(2, dtype=dtype)
    before, state = tensors_of(run), copy.deepcopy(run.optimizer.state_dict())
    random = torch.get_rng_state()
    got = importances(run, draw(50), 1e-3)
    assert any(got.values())
    assert not moved(run, before)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(run.model.get_parameter("classifier.bias").grad, torch.ones(2, dtype=dtype))
    after = run.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, own in state["state"].items():
        for name, value in own.items():
            assert torch.equal(after["state"][key][name], value), name


def test_a_rate_of_zero_is_replaced() -> None:
    run = make_run(layers=2)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    assert any(importances(run, draw(50), 1e-3).values())
    assert run.optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("kind", "share"), [("bert", 0.5), ("distilbert", 0.7), ("modernbert", 0.6)]
)
def test_a_run_holds_its_budget_as_measured(kind: str, share: float) -> None:
    named = {"local_attention": 64} if kind == "modernbert" else {}
    run, method = make_run(kind, **named), GreenTrainer(share=share, selections=3)
    method.begin(run)
    for number in range(12):
        before = tensors_of(run)
        step(method, run, number)
        assert run.plan is not None
        assert run.plan.flops_ratio <= share * (1 + 1e-9)
        assert moved(run, before) <= set(run.plan.trainable or ())
        assert set(head_of(run.model)) <= set(run.plan.trainable or ())
        if number % 4 == 0:
            assert_costs_as_planned(run, 1e-3 if kind == "modernbert" else 1e-9)
    said = [event.partition(":")[0] for event in run.events]
    assert said == ["step 0", "step 4", "step 8"]
    assert run.plan is not None
    assert run.plan.flops_ratio > share - 0.2


def test_frozen_words_are_never_chosen() -> None:
    run, method = make_run(layers=2), GreenTrainer(share=1.0)
    words = "bert.embeddings.word_embeddings.weight"
    run.model.get_parameter(words).requires_grad_(False)
    step(method, run, 0)
    assert run.plan is not None
    assert words not in (run.plan.trainable or ())
    assert len(run.plan.trainable or ()) > 4


@pytest.mark.parametrize(("at", "dtype"), [(4, torch.float32), (5, torch.bfloat16)])
def test_a_killed_run_goes_on_to_the_bit(at: int, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_resumes(
        lambda: GreenTrainer(share=0.6), lambda: make_run(layers=2, dtype=dtype), at, tmp_path
    )


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"share: expected a share in \(0, 1\], got 0"):
        GreenTrainer(share=0)
    with pytest.raises(UsageError, match="selections: expected at least 1, got 0"):
        GreenTrainer(selections=0)
    run = make_run()
    with pytest.raises(UsageError, match=r"share: expected at least 0\.3\d+, forward pass and"):
        GreenTrainer(share=0.1).begin(run)
    other = make_run(optimizer=torch.optim.SGD)
    with pytest.raises(UsageError, match="optimizer: expected SubsetAdamW or AdamW, got SGD"):
        GreenTrainer().begin(other)
    run.batches = lambda: iter(())
    with pytest.raises(UsageError, match="batches: expected at least one to rank by, got none"):
        GreenTrainer().begin_step(run)
