"""FAR: which neurons are frozen after the priming, that they stay, and what a step costs."""

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
from sensikernels.methods.far import FAR, kept_count, priming_steps
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make

HEAD = "ForSequenceClassification"
IN, OUT = "intermediate.dense", "output.dense"


def make_run(model: nn.Module | None = None, *, kind: Any = SubsetAdamW) -> Run:
    model = make_model() if model is None else model
    return Run(
        model=model,
        optimizer=kind(model.parameters(), lr=1e-2),
        max_steps=20,
        batches=lambda: [],
        geometry=Geometry.uniform(9),
    )


def far() -> FAR:
    return FAR(priming=0.15, share=0.4)  # 3 of 20 steps, 16 of 48 neurons


def step(one: FAR, run: Run, index: int, batch: Any = None) -> None:
    run.step = index
    one.begin_step(run)
    run.model(**(make_batch(seed=index) if batch is None else batch)).loss.backward()
    one.before_step(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def drive(one: FAR, run: Run, steps: int, batch: Any = None) -> None:
    one.begin(run)
    for index in range(steps):
        step(one, run, index, batch)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_counts_and_steps() -> None:
    assert [kept_count(n, 0.4) for n in (3072, 1536, 128, 48, 16, 15, 2)] == [
        1232,
        608,
        48,
        16,
        16,
        6,
        1,
    ]
    assert [priming_steps(n, 0.05) for n in (1, 19, 40, 100)] == [1, 1, 2, 5]


@given(st.integers(1, 5000), st.floats(0.001, 0.999))
def test_kept_counts_are_multiples_and_at_most_all(units: int, share: float) -> None:
    kept = kept_count(units, share)
    assert 1 <= kept <= units
    if units >= 16:
        assert kept % 16 == 0
        assert abs(kept - share * units) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neurons_that_moved_least_stay_to_the_bit(dtype: torch.dtype) -> None:
    run, one = make_run(make_model().to(dtype)), far()
    start = tensors(run.model)
    drive(one, run, 3)
    assert len(one.state()) == 4  # still priming
    primed = tensors(run.model)
    assert all(not torch.equal(primed[n], start[n]) for n in start if n.endswith("weight"))
    named = dict(run.model.named_parameters())
    exact = {n: run.optimizer.state[p].get("master", p.detach()) for n, p in named.items()}
    for index in range(3, 7):
        step(one, run, index)
    now = tensors(run.model)
    assert run.plan is not None
    for layer in range(2):
        stem = f"bert.encoder.layer.{layer}"
        up, down = f"{stem}.{IN}", f"{stem}.{OUT}"
        moved = (exact[f"{up}.weight"] - start[f"{up}.weight"].float()).abs().sum(1)
        moved += (exact[f"{down}.weight"] - start[f"{down}.weight"].float()).abs().sum(0)
        kept = torch.zeros(48, dtype=torch.bool)
        kept[moved.argsort(descending=True, stable=True)[:16]] = True
        assert torch.equal(run.plan.update_masks[up].grid[:, 0], kept)
        assert torch.equal(run.plan.update_masks[down].grid[0], kept)
        for name, still, live in (
            (f"{up}.weight", (~kept, slice(None)), (kept, slice(None))),
            (f"{up}.bias", (~kept,), (kept,)),
            (f"{down}.weight", (slice(None), ~kept), (slice(None), kept)),
        ):
            assert torch.equal(now[name][still], primed[name][still]), name
            assert not torch.equal(now[name][live], primed[name][live]), name
    rest = [n for n in now if ".intermediate." not in n and n.endswith("weight")]
    assert all(not torch.equal(now[name], primed[name]) for name in rest)
    assert one.state() == {}


def test_movement_that_bfloat16_does_not_show_counts() -> None:
    run, one = make_run(make_model().bfloat16()), far()
    run.optimizer.param_groups[0]["lr"] = 1e-6
    start = tensors(run.model)
    drive(one, run, 3)
    weights = {n: p for n, p in run.model.named_parameters() if n.endswith(f"{IN}.weight")}
    assert all(float((w != start[n]).float().mean()) < 0.1 for n, w in weights.items())
    exact = {n: run.optimizer.state[p]["master"].clone() for n, p in run.model.named_parameters()}
    run.step = 3
    one.begin_step(run)
    assert run.plan is not None
    stem = "bert.encoder.layer.1"
    moved = (exact[f"{stem}.{IN}.weight"] - start[f"{stem}.{IN}.weight"].float()).abs().sum(1)
    moved += (exact[f"{stem}.{OUT}.weight"] - start[f"{stem}.{OUT}.weight"].float()).abs().sum(0)
    best = moved.argsort(descending=True, stable=True)[:16]
    assert bool(run.plan.update_masks[f"{stem}.{IN}"].grid[best].all())


def test_flops_and_moments_are_those_of_the_kept() -> None:
    run, one = make_run(), far()
    drive(one, run, 5)
    assert run.plan is not None
    batch = make_batch()
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert counted == pytest.approx(run.plan.flops_planned, rel=0.03)
    saved = 2 * 2 * 2 * 32 * (48 - 16)  # two layers of two linears, 2·in·out each
    assert run.plan.flops_dense - run.plan.flops_planned == pytest.approx(saved)
    up: Any = run.model.get_submodule(f"bert.encoder.layer.0.{IN}")
    assert up.values.shape == (16, 32)
    assert run.optimizer.state[up.values]["exp_avg"].shape == (16, 32)
    assert run.optimizer.state[up.bias]["exp_avg"].shape == (16,)
    trained = tensors(run.model)
    whole = compact(run.model).state_dict()
    assert all(torch.equal(whole[name], value) for name, value in trained.items())


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_same_bits(dtype: torch.dtype, at: int) -> None:
    run, one = make_run(make_model().to(dtype)), far()
    one.begin(run)
    for index in range(7):
        if index == at:
            saved = copy.deepcopy([one.state(), run.model.state_dict(), run.optimizer.state_dict()])
            plan = run.plan
        step(one, run, index)
    again, other = make_run(make_model().to(dtype)), far()
    again.step, again.plan = at, plan
    other.resume(again, saved[0])
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    for index in range(at, 7):
        step(other, again, index)
    first, second = tensors(run.model), tensors(again.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["distilbert", "deberta-v2"])
def test_other_families(kind: str) -> None:
    run, one, batch = make_run(make(kind, HEAD)), far(), draw(HEAD, kind)
    drive(one, run, 5, batch)
    assert run.plan is not None
    masks = run.plan.update_masks.values()
    kept = [kept_count(max(mask.grid.shape), 0.4) for mask in masks]
    assert [int(mask.grid.sum()) for mask in masks] == kept
    assert len(kept) == 4


def test_both_halves_of_a_gated_unit_go_together() -> None:
    run, one, batch = make_run(make("modernbert", HEAD)), far(), draw(HEAD, "modernbert")
    start = tensors(run.model)
    drive(one, run, 3, batch)
    primed = tensors(run.model)
    for index in range(3, 5):
        step(one, run, index, batch)
    now = tensors(run.model)
    assert run.plan is not None
    for layer in range(2):
        up, down = f"model.layers.{layer}.mlp.Wi", f"model.layers.{layer}.mlp.Wo"
        moved = (primed[f"{up}.weight"] - start[f"{up}.weight"]).abs().sum(1).view(2, 48).sum(0)
        moved += (primed[f"{down}.weight"] - start[f"{down}.weight"]).abs().sum(0)
        kept = torch.zeros(48, dtype=torch.bool)
        kept[moved.argsort(descending=True, stable=True)[:16]] = True
        both = kept.repeat(2)
        assert torch.equal(run.plan.update_masks[up].grid[:, 0], both)
        assert torch.equal(now[f"{up}.weight"][~both], primed[f"{up}.weight"][~both])
        assert not torch.equal(now[f"{up}.weight"][both], primed[f"{up}.weight"][both])
        assert torch.equal(now[f"{down}.weight"][:, ~kept], primed[f"{down}.weight"][:, ~kept])


def test_what_did_not_train_before_does_not_after() -> None:
    run, one = make_run(), far()
    words: Any = run.model.get_input_embeddings()  # type: ignore[operator]
    words.weight.requires_grad_(False)
    before = words.weight.clone()
    drive(one, run, 5)
    assert torch.equal(words.weight, before)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"priming: expected a share in \(0, 1\), got 0"):
        FAR(priming=0)
    with pytest.raises(UsageError, match=r"share: expected a share in \(0, 1\), got 1"):
        FAR(share=1)
    with pytest.raises(UsageError, match="optimizer: expected SubsetAdamW for far, got AdamW"):
        FAR().begin(make_run(kind=torch.optim.AdamW))
