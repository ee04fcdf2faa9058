"""Each part of the step alone through ``apply``, with a plan, and back to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import STEP_FEATURES, apply, packing_of, restore, sensitivity
from sensikernels.masks import Budget, Plan, plan
from tests.hf.packed_cases import LENGTHS, SMALL, draw, make, run, same

PLAIN = ("dropout", "words", "packed", "cls", "fused")


def small() -> nn.Module:
    return make(num_hidden_layers=3).double()


def half(model: nn.Module) -> Plan:
    scores = sensitivity(model, [draw("classification", LENGTHS["ragged"])])
    return plan(scores, Budget(flops=0.5), multiples=SMALL, minimums=SMALL)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Classes, flags and values: all that a part may change."""
    found: dict[str, object] = {n: type(m) for n, m in model.named_modules()}
    found |= {f"{n} grad": p.requires_grad for n, p in model.named_parameters()}
    found |= {n: v.tolist() for n, v in model.state_dict().items()}
    words = model.get_input_embeddings()  # type: ignore[operator]
    config = model.config
    return found | {"sparse": words.sparse, "attention": config._attn_implementation}  # type: ignore[union-attr]


@pytest.mark.parametrize("features", [(p,) for p in PLAIN] + [PLAIN], ids="+".join)
def test_a_feature_changes_no_number_and_goes_without_a_trace(features: tuple[str, ...]) -> None:
    model, batch = small(), draw("classification", LENGTHS["ragged"])
    before = snapshot(model)
    wanted, grads = run(model, batch)
    model.zero_grad(set_to_none=True)
    report = apply(model, features=features)
    assert report
    got, ours = run(model, batch)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-12)
    same({n: g.to_dense() if g.is_sparse else g for n, g in ours.items()}, grads, 1e-12)
    restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("order", [("plan", "features"), ("features", "plan")], ids="+".join)
def test_parts_and_plan_in_either_order(order: tuple[str, ...]) -> None:
    model, batch = small(), draw("classification", LENGTHS["ragged"])
    before, chosen = snapshot(model), half(model)
    plain = copy.deepcopy(model)
    apply(plain, chosen)
    wanted, _ = run(plain, batch)
    for what in order:
        if what == "plan":
            apply(model, chosen)
        else:
            apply(model, features=("packed", "cls", "fused"))
    got, _ = run(model, batch)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-12)
    restore(model)
    assert snapshot(model) == before


def test_a_copy_is_restored_on_its_own() -> None:
    model = small()
    before = snapshot(model)
    apply(model, half(model), features=PLAIN)
    twin = copy.deepcopy(model)
    restore(model)
    assert snapshot(model) == before
    assert packing_of(twin) is not None
    restore(twin)
    assert snapshot(twin) == before


def test_every_part_is_tested() -> None:
    assert {*PLAIN, "labelled", "prefix-cache"} == set(STEP_FEATURES)


def test_labelled_tokens_have_the_loss_of_all() -> None:
    model, batch = make("language").double(), draw("language", LENGTHS["ragged"])
    before = snapshot(model)
    wanted, grads = run(model, batch)
    model.zero_grad(set_to_none=True)
    apply(model, features="labelled")
    got, ours = run(model, batch)
    torch.testing.assert_close(got.loss.double(), wanted.loss, rtol=1e-6, atol=0)
    same(ours, grads, 1e-6)
    assert len(got.logits) == int((batch["labels"] != -100).sum())
    restore(model)
    assert snapshot(model) == before


def test_a_prefix_that_the_plan_freezes_is_kept() -> None:
    model, batch = small(), draw("classification", LENGTHS["ragged"])
    before = snapshot(model)
    top = tuple(
        n for n, _ in model.named_parameters() if ".embeddings." not in n and ".0." not in n
    )
    wanted, _ = run(model, batch)
    model.zero_grad(set_to_none=True)
    report = apply(model, Plan(method="top", trainable=top), features="prefix-cache")
    assert "output of the lowest 1 layers kept" in report
    for _ in range(2):
        got, _ = run(model, batch)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-12)
    assert model.bert.prefix_cache.hits == len(batch["input_ids"])  # type: ignore[union-attr]
    restore(model)
    assert snapshot(model) == before


def test_what_cannot_be_changes_nothing() -> None:
    model = small()
    before = snapshot(model)
    with pytest.raises(UsageError, match="features: expected one of cls, .*got 'speed'"):
        apply(model, features=("packed", "speed"))
    with pytest.raises(UsageError, match="plan: expected a plan, features or both, got neither"):
        apply(model)
    with pytest.raises(UsageError, match="model: expected frozen embeddings"):
        apply(model, features=("dropout", "words", "prefix-cache"))
    with pytest.raises(UsageError, match="model: expected frozen embeddings"):
        apply(model, half(model), features=("dropout", "words", "prefix-cache"))
    assert snapshot(model) == before
    apply(model, features="packed")
    with pytest.raises(UsageError, match="features: expected none in use"):
        apply(model, features="dropout")
    restore(model)
    with pytest.raises(UsageError, match="expected a plan or features applied, got none"):
        restore(model)
    assert snapshot(model) == before
