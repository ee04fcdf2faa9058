"""What trains changes in the middle of a run: moments, order, FLOPs, and gradients to rank by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.data import geometry
from sensikernels.hf import apply, computed, training_flops, use_packed
from sensikernels.masks import Plan
from sensikernels.methods import Method, Run
from sensikernels.methods.trained import (
    head_of,
    names_of,
    outside_layers,
    ranking_gradients,
    train_only,
)
from sensikernels.optim import SubsetAdamW
from tests.hf.families import DIFFERENCES, WORDS, make

HEAD = "ForSequenceClassification"


def draw(seed: int) -> dict[str, Tensor]:
    """Four rows of up to nine tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 5:] = 0
    ids = torch.randint(4, WORDS, (4, 9), generator=generator)
    labels = torch.randint(0, 2, (4,), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask, "labels": labels}


def make_run(
    kind: str = "bert",
    *,
    layers: int = 4,
    max_steps: int = 12,
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
    optimizer: Callable[..., torch.optim.Optimizer] = SubsetAdamW,
    **named: Any,
) -> Run:
    """A run of a small model, weights that decay and such that do not in two groups."""
    model: Any = make(kind, HEAD, num_hidden_layers=layers, **named).to(dtype)
    if packed:
        use_packed(model)
    model.get_input_embeddings().sparse = optimizer is SubsetAdamW
    plain = [p for p in model.parameters() if p.ndim == 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return Run(
        model=model,
        optimizer=optimizer(groups, lr=3e-3),
        max_steps=max_steps,
        batches=lambda: iter([draw(100), draw(101)]),
        geometry=geometry([computed(model, draw(0))]),
    )


def tensors_of(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def moved(run: Run, before: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that are no longer as in ``before``."""
    return {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}


def step(method: Method, run: Run, number: int) -> None:
    run.step = number
    method.begin_step(run)
    run.model(**draw(number)).loss.backward()
    method.before_step(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step = number + 1


def assert_resumes(
    make_method: Callable[[], Method], start: Callable[[], Run], at: int, folder: Path
) -> Run:
    """A run that is cut after ``at`` steps and resumed ends as one that is not; the latter."""
    whole, method = start(), make_method()
    method.begin(whole)
    for number in range(whole.max_steps):
        if number == at:
            assert whole.plan is not None
            whole.plan.save(folder / "plan.json")
            kept = copy.deepcopy(
                (whole.model.state_dict(), whole.optimizer.state_dict(), method.state())
            )
        step(method, whole, number)
    again, fresh = start(), make_method()
    again.step, again.plan = at, Plan.load(folder / "plan.json")
    weights, optimizer, tensors = kept
    fresh.resume(again, tensors)
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(optimizer)
    for number in range(at, again.max_steps):
        step(fresh, again, number)
    assert again.plan is not None
    assert whole.plan is not None
    assert again.plan.to_json() == whole.plan.to_json()
    assert not moved(again, tensors_of(whole))
    return whole


def assert_costs_as_planned(run: Run, rel: float = 1e-9) -> None:
    assert run.plan is not None
    batch = computed(run.model, draw(0))
    counted = training_flops(run.model, draw(0)) / batch["input_ids"].numel()
    assert run.plan.flops_planned == pytest.approx(counted, rel=rel)


def exp_avg(run: Run, name: str) -> Tensor | None:
    found: Tensor | None = run.optimizer.state.get(run.model.get_parameter(name), {}).get("exp_avg")
    return found


LOW, HIGH = (f"bert.encoder.layer.{i}.output.dense.weight" for i in (0, 3))


def test_what_stays_keeps_its_moments_and_what_comes_back_has_none() -> None:
    run = make_run()
    names = names_of(run.model)
    step(Method(), run, 0)
    held = exp_avg(run, HIGH)
    assert held is not None
    train_only(run, [n for n in names if n != LOW], method="x", why="test")
    assert exp_avg(run, HIGH) is held
    assert exp_avg(run, LOW) is None
    before = tensors_of(run)
    step(Method(), run, 1)
    assert LOW not in moved(run, before)
    train_only(run, names, method="x")
    assert exp_avg(run, LOW) is None
    assert exp_avg(run, HIGH) is held
    step(Method(), run, 2)
    assert LOW in moved(run, before)


@pytest.mark.parametrize("optimizer", [SubsetAdamW, torch.optim.AdamW])
def test_groups_keep_the_models_order(optimizer: Any) -> None:
    run = make_run(optimizer=optimizer)
    groups = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
    names = names_of(run.model)
    for chosen in (names[::3], names[1::2], names[5:9], names[::-2], names):
        train_only(run, chosen, method="x")
        place = {id(p): n for n, p in run.model.named_parameters()}
        for group, whole in zip(run.optimizer.param_groups, groups, strict=True):
            assert [id(p) for p in group["params"]] == [i for i in whole if place[i] in chosen]


def test_what_was_frozen_before_stays_so() -> None:
    run = make_run()
    words = "bert.embeddings.word_embeddings.weight"
    run.model.get_parameter(words).requires_grad_(False)
    for _ in range(2):
        train_only(run, names_of(run.model), method="x")
        assert run.plan is not None
        assert run.plan.trainable == tuple(n for n in names_of(run.model) if n != words)
        assert not run.model.get_parameter(words).requires_grad


def test_the_plan_says_what_trains_and_what_it_costs() -> None:
    run = make_run()
    for names in (head_of(run.model), [LOW, "classifier.bias"], names_of(run.model)):
        train_only(run, names, method="x", why="test")
        assert run.plan is not None
        assert run.plan.trainable == tuple(n for n in names_of(run.model) if n in names)
        assert (run.plan.method, run.plan.origin) == ("x", {"why": "test"})
        assert_costs_as_planned(run)
    assert run.plan is not None
    assert run.plan.flops_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_heads_and_layers_of_every_family(kind: str) -> None:
    model = make(kind, HEAD)
    head, outside = head_of(model), outside_layers(model)
    assert {"classifier"} <= {name.partition(".")[0] for name in head}
    assert set(head) < set(outside) < set(names_of(model))
    assert not any(".layer" in name for name in outside)
    assert not any("embeddings" in name for name in head)
    assert head_of(make(kind, "Model")) == ()


def test_ranking_gradients_are_those_without_dropout_and_leave_no_trace() -> None:
    run = make_run(dropout=0.5)
    words = "bert.embeddings.word_embeddings.weight"
    train_only(run, ["classifier.weight"], method="x")
    run.model.train()
    run.model.get_parameter("classifier.weight").grad = torch.ones(2, 32)
    random, batch = torch.get_rng_state(), draw(3)
    with ranking_gradients(run, [LOW, words]) as gradients:
        got = gradients(batch)
    assert set(got) == {LOW, words}
    assert got[words].is_sparse
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in run.model.modules())
    assert [n for n, p in run.model.named_parameters() if p.requires_grad] == ["classifier.weight"]
    assert torch.equal(run.model.get_parameter("classifier.weight").grad, torch.ones(2, 32))
    model: nn.Module = copy.deepcopy(run.model).eval()
    model.requires_grad_(True)
    model(**batch).loss.backward()
    for name, grad in got.items():
        want = model.get_parameter(name).grad
        assert want is not None
        torch.testing.assert_close(grad.to_dense(), want.to_dense())


def test_refusals_change_nothing() -> None:
    run = make_run()
    with pytest.raises(UsageError, match=r"names: expected parameters of the model, got \['x'\]"):
        train_only(run, ["x"], method="x")
    with pytest.raises(UsageError, match="names: expected at least one parameter"):
        train_only(run, [], method="x")
    featured = make_run(packed=False)
    apply(featured.model, features=("packed",))
    with pytest.raises(UsageError, match="model: expected no features of apply"):
        train_only(featured, names_of(featured.model), method="x")
    for one in (run, featured):
        assert one.plan is None
        assert all(p.requires_grad for p in one.model.parameters())
