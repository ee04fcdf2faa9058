"""SIFT: which entries are chosen, that these and the head alone move, and what a step costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import compact, training_flops
from sensikernels.masks import Geometry
from sensikernels.methods import Run
from sensikernels.methods.sift import SIFT, kept_count, linears_of
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make

HEAD = "ForSequenceClassification"
PATHS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output")


def make_run(model: nn.Module | None = None, *, kind: Any = SubsetAdamW, decay: float = 0.1) -> Run:
    model = make_model() if model is None else model
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": decay},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]
    return Run(
        model=model,
        optimizer=kind(groups, lr=1e-2),
        max_steps=10,
        batches=lambda: [],
        geometry=Geometry.uniform(9),
    )


def step(one: SIFT, run: Run, index: int, batch: Any = None) -> None:
    run.step = index
    one.begin_step(run)
    run.model(**(make_batch(seed=index) if batch is None else batch)).loss.backward()
    one.before_step(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def drive(one: SIFT, run: Run, steps: int, batch: Any = None) -> None:
    one.begin(run)
    for index in range(steps):
        step(one, run, index, batch)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@given(st.integers(1, 1 << 20), st.floats(1e-6, 0.999))
def test_counts(entries: int, share: float) -> None:
    kept = kept_count(entries, share)
    assert 1 <= kept <= entries
    assert kept == int(share * entries) + 1 or kept == entries


def test_counts_of_the_papers_model() -> None:
    assert kept_count(1024 * 1024, 0.008) == 8389
    assert 24 * 4 * kept_count(1024 * 1024, 0.008) == 805_344  # "0.8 M" of RoBERTa-large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [SubsetAdamW, torch.optim.AdamW])
def test_the_first_gradients_largest_and_the_head_move(kind: Any, dtype: torch.dtype) -> None:
    run, one = make_run(make_model().to(dtype), kind=kind), SIFT(share=0.05)
    start = tensors(run.model)
    run.model(**make_batch(seed=0)).loss.backward()
    grads = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()
    drive(one, run, 1)
    now = tensors(run.model)
    assert all(torch.equal(now[name], start[name]) for name in start)  # the update is left out
    assert not any(run.optimizer.state.values())
    for index in range(1, 4):
        step(one, run, index)
    now = tensors(run.model)
    assert run.plan is not None
    assert len(run.plan.update_masks) == 2 * 4
    for name, value in now.items():
        moved = value != start[name]
        module = name.removesuffix(".weight")
        if module in run.plan.update_masks:
            assert any(path in name for path in PATHS)
            order = grads[name].float().abs().flatten().argsort(descending=True, stable=True)
            want = torch.zeros(value.numel(), dtype=torch.bool)
            want[order[: int(0.05 * value.numel()) + 1]] = True
            mask = run.plan.update_masks[module].grid
            assert torch.equal(mask.flatten(), want)
            assert not bool(moved[~mask].any())
            assert bool(moved.any())
        else:
            assert bool(moved.any()) == name.startswith("classifier"), name
    held = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert held == 8 * kept_count(32 * 32, 0.05) + 2 * 32 + 2


def test_kept_entries_follow_adam_without_decay() -> None:
    run, one = make_run(), SIFT(share=0.05)
    drive(one, run, 1)
    plain = copy.deepcopy(run.model)
    for index in range(1, 4):
        step(one, run, index)
    assert run.plan is not None
    weights = {f"{name}.weight": mask.grid for name, mask in run.plan.update_masks.items()}
    named = dict(plain.named_parameters())
    head = {n: p for n, p in named.items() if n.startswith("classifier")}
    adam = torch.optim.AdamW(
        [named[n] for n in weights] + list(head.values()), lr=1e-2, weight_decay=0.0
    )
    for index in range(1, 4):
        plain.zero_grad()
        plain(**make_batch(seed=index)).loss.backward()
        for name, mask in weights.items():
            named[name].grad.mul_(mask)  # type: ignore[union-attr]
        adam.step()
    for name, value in tensors(run.model).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_flops_are_as_planned_and_the_model_comes_back_whole() -> None:
    run, one = make_run(), SIFT()
    drive(one, run, 3)
    assert run.plan is not None
    batch = make_batch()
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert counted == pytest.approx(run.plan.flops_planned, rel=0.03)
    assert run.plan.flops_ratio < 0.85
    trained = tensors(run.model)
    small = compact(run.model)
    assert all(torch.equal(small.state_dict()[name], value) for name, value in trained.items())


@pytest.mark.parametrize("at", [1, 2, 4])
def test_resumes_to_the_same_bits(at: int) -> None:
    run, one = make_run(make_model().bfloat16()), SIFT(share=0.05)
    one.begin(run)
    for index in range(6):
        if index == at:
            saved = copy.deepcopy([one.state(), run.model.state_dict(), run.optimizer.state_dict()])
            plan = run.plan
        step(one, run, index)
    again, other = make_run(make_model().bfloat16()), SIFT(share=0.05)
    again.step, again.plan = at, plan
    other.resume(again, saved[0])
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    for index in range(at, 6):
        step(other, again, index)
    first, second = tensors(run.model), tensors(again.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("distilbert", ("pre_classifier", "classifier")),
        ("roberta", ("classifier",)),
        ("modernbert", ("head", "classifier")),
        ("deberta-v2", ("pooler", "classifier")),
    ],
)
def test_other_families_train_what_lies_outside_the_encoder(
    kind: str, head: tuple[str, ...]
) -> None:
    run, batch = make_run(make(kind, HEAD)), draw(HEAD, kind)
    start = tensors(run.model)
    drive(SIFT(share=0.05), run, 3, batch)
    assert run.plan is not None
    chosen = {f"{name}.weight" for name in run.plan.update_masks}
    assert len(chosen) == 2 * (2 if kind == "modernbert" else 4)
    moved = {n for n, value in tensors(run.model).items() if not torch.equal(value, start[n])}
    assert moved <= chosen | {n for n in start if n.startswith(head)}
    assert chosen <= moved
    assert any(n.startswith(head[0]) for n in moved)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"share: expected a share in \(0, 1\), got 0"):
        SIFT(share=0)
    with pytest.raises(UsageError, match="roles: expected one of attention_output, "):
        SIFT(roles=("queries",))
    with pytest.raises(UsageError, match="roles: expected at least one, got none"):
        SIFT(roles=())
    joined = make("modernbert", HEAD)
    with pytest.raises(UsageError, match="query, key and value together for ModernBERT, got query"):
        SIFT(roles=("query", "output")).begin(make_run(joined))
    assert len(linears_of(joined, ("output",))) == 2
