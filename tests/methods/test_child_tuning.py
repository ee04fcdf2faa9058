"""Child-Tuning D and F: what is chosen, what moves, and what the gradients become."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sensikernels._core.bits import unpack_bits
from sensikernels._core.errors import UsageError
from sensikernels.hf import encoder_layers
from sensikernels.masks import Geometry
from sensikernels.methods import Run, method
from sensikernels.methods.child_tuning import ChildTuning, fisher, layer_parameters
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make

HEAD = "ForSequenceClassification"


def make_run(model: nn.Module | None = None, *, kind: Any = SubsetAdamW, **named: Any) -> Run:
    model = make_model() if model is None else model
    batches = named.pop("batches", [make_batch(seed=seed, rows=6) for seed in range(3)])
    return Run(
        model=model,
        optimizer=kind(model.parameters(), lr=1e-2),
        max_steps=10,
        batches=lambda: batches,
        geometry=Geometry.uniform(9),
        **named,
    )


def step(one: Any, run: Run, index: int, batch: Any = None) -> None:
    run.step = index
    one.begin_step(run)
    run.model(**(make_batch(seed=index) if batch is None else batch)).loss.backward()
    one.before_step(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def masks(one: Any, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return {
        name: unpack_bits(bits, named[name].numel()).view(named[name].shape)
        for name, bits in one.state().items()
    }


def by_hand(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """Σ clip(g)² / N, as the authors' code takes it: through ``.grad``, a tensor at a time."""
    names = [n for n, _ in model.named_parameters() if ".encoder.layer." in n]
    named = dict(model.named_parameters())
    sums = {name: torch.zeros(named[name].shape) for name in names}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in names:
            torch.nn.utils.clip_grad_norm_([named[name]], 1.0)
            sums[name] += named[name].grad.square() / len(batches)  # type: ignore[union-attr]
    model.zero_grad()
    return sums


def test_fisher_is_the_clipped_squares_mean() -> None:
    run = make_run()
    with torch.no_grad():  # gradients above and below a norm of 1
        next(p for n, p in layer_parameters(run.model) if "query" in n).mul_(30)
    want = by_hand(run.model.train(), list(run.batches()))
    run.model.eval()
    got = fisher(run)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-12)
    assert not run.model.training
    assert all(p.grad is None for p in run.model.parameters())


def test_fisher_is_taken_in_train_mode() -> None:
    run = make_run(make_model(dropout=0.5))
    run.model.eval()
    torch.manual_seed(0)
    one = fisher(run)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.values(), fisher(run).values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_d_trains_the_global_top_and_all_outside_the_layers(dtype: torch.dtype) -> None:
    run, one = make_run(make_model().to(dtype)), ChildTuning(reserve=0.2)
    one.begin(run)
    sums = fisher(run)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for index in range(3):
        step(one, run, index)
    kept, total = masks(one, run.model), sum(v.numel() for v in sums.values())
    flat = torch.cat([v.flatten() for v in sums.values()])
    order = flat.argsort(descending=True, stable=True)
    want = torch.zeros(total, dtype=torch.bool)
    want[order[: round(0.2 * total)]] = True
    assert torch.equal(torch.cat([m.flatten() for m in kept.values()]), want)
    shares = {float(m.float().mean()) for m in kept.values()}
    assert len(shares) > 3  # global: not the same share of every tensor
    for name, parameter in run.model.named_parameters():
        moved = parameter != before[name]
        frozen = ~kept[name] if name in kept else torch.zeros_like(moved)
        assert not bool(moved[frozen].any()), name
        assert bool(moved.any()) or not bool((~frozen).any()) or dtype is torch.bfloat16
    assert {n for n in before if n not in kept} == {n for n in before if ".encoder.layer." not in n}
    assert run.plan is not None
    assert run.plan.origin["kept"] == round(0.2 * total)
    for name, mask in run.plan.update_masks.items():
        assert torch.equal(mask.grid, kept[f"{name}.weight"])


def test_as_published_masks_gradients_alone() -> None:
    run = make_run(kind=torch.optim.AdamW)
    one = ChildTuning(reserve=0.2, as_published=True)
    one.begin(run)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.step = 0
    one.begin_step(run)
    kept = masks(one, run.model)
    run.model(**make_batch()).loss.backward()
    grads = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    one.before_step(run)
    run.optimizer.step()
    for name, parameter in run.model.named_parameters():
        mask = kept.get(name, torch.ones(()))
        assert torch.equal(parameter.grad, grads[name] * mask)  # type: ignore[arg-type]
        if name in kept and parameter.ndim == 2:  # frozen entries decay, and no more
            still = ~kept[name]
            decayed = before[name] * (1 - 1e-2 * 1e-2)
            torch.testing.assert_close(parameter[still], decayed[still])


def grads_after(run: Run, one: Any, index: int) -> dict[str, Tensor]:
    run.step = index
    run.model.zero_grad()
    run.model(**make_batch()).loss.backward()
    one.before_step(run)
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}


def test_f_draws_every_gradient_anew_each_step() -> None:
    run, one = make_run(kind=torch.optim.AdamW), ChildTuning(variant="F", reserve=0.25)
    run.model(**make_batch()).loss.backward()
    whole = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    first, again, next_step = (grads_after(run, one, index) for index in (0, 0, 1))
    kept = total = 0
    for name, grad in whole.items():
        drawn = first[name] != 0
        torch.testing.assert_close(first[name][drawn], grad[drawn] / 0.25)
        kept, total = kept + int(drawn.sum()), total + int((grad != 0).sum())
        assert torch.equal(first[name], again[name])
    assert kept / total == pytest.approx(0.25, abs=0.02)
    assert any(not torch.equal(first[name], next_step[name]) for name in whole)
    assert run.plan is None
    assert one.state() == {}


def test_f_draws_an_entry_of_a_row_sparse_gradient_once() -> None:
    run, one = make_run(), ChildTuning(variant="F", reserve=0.5)
    words: Any = run.model.get_input_embeddings()  # type: ignore[operator]
    words.sparse = True
    batch = make_batch()
    batch["input_ids"] = batch["input_ids"] % 3 + 1  # each word several times
    run.model(**batch).loss.backward()
    whole = words.weight.grad.coalesce()
    one.before_step(run)
    grad = words.weight.grad
    assert grad.is_sparse
    assert grad._indices().shape[1] == whole.indices().shape[1] <= 3
    made, want = grad.to_dense(), whole.to_dense()
    drawn = made != 0
    torch.testing.assert_close(made[drawn], want[drawn] * 2)
    assert 0.3 < float(drawn.sum() / (want != 0).sum()) < 0.7
    run.optimizer.step()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_f_keeps_the_gradient_on_average(share: float, seed: int) -> None:
    model = nn.Linear(100, 200, bias=False)
    model.weight.grad = torch.ones(200, 100)
    run = Run(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        max_steps=1,
        batches=lambda: [],
        geometry=Geometry.uniform(9),
        seed=seed,
    )
    ChildTuning(variant="F", reserve=share).before_step(run)
    spread = 6 * ((1 - share) / share / 20_000) ** 0.5
    assert float(model.weight.grad.mean()) == pytest.approx(1, abs=spread + 1e-6)


@pytest.mark.parametrize("options", [{}, {"as_published": True}, {"variant": "F"}], ids=str)
def test_resumes_to_the_same_bits(options: dict[str, Any]) -> None:
    run, one = make_run(), ChildTuning(**options)
    one.begin(run)
    for index in range(6):
        if index == 3:
            saved = copy.deepcopy([one.state(), run.model.state_dict(), run.optimizer.state_dict()])
            plan = run.plan
        step(one, run, index)
    again, other = make_run(), ChildTuning(**options)
    again.step, again.plan = 3, plan
    other.resume(again, saved[0])
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    for index in range(3, 6):
        step(other, again, index)
    for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "deberta-v2"])
def test_other_families(kind: str) -> None:
    model, batch = make(kind, HEAD), draw(HEAD, kind)
    run, one = make_run(model, batches=[batch]), method("child-tuning", reserve=0.1)
    one.begin(run)
    prefixes = tuple(f"{layer.prefix}." for layer in encoder_layers(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for index in range(2):
        step(one, run, index, batch)
    kept = masks(one, model)
    assert set(kept) == {n for n in before if n.startswith(prefixes)}
    for name, mask in kept.items():
        assert torch.equal(dict(model.named_parameters())[name][~mask], before[name][~mask])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="variant: expected one of D, F, got 'G'"):
        ChildTuning(variant="G")
    with pytest.raises(UsageError, match=r"reserve: expected a share in \(0, 1\], got 0"):
        ChildTuning(reserve=0)
    with pytest.raises(UsageError, match="expected SubsetAdamW for child-tuning D"):
        ChildTuning().begin(make_run(kind=torch.optim.AdamW))
    ChildTuning(variant="F").begin(make_run(kind=torch.optim.AdamW))
    with pytest.raises(UsageError, match="batches: expected at least one batch, got none"):
        ChildTuning().begin_step(make_run(batches=[]))
