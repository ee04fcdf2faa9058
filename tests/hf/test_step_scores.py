"""Mask gradients from the weight gradients of training steps equal those that activations give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import sensitivity, structure_of, use_packed
from sensikernels.hf.criteria import StepScores
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import DIFFERENCES, draw, make


def stepped(model: nn.Module, batches: list[Any], granularity: str = "heads") -> StepScores:
    """What backward passes on ``batches`` add up, no weight moved."""
    found = StepScores(model, structure_of(model, granularity))
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        found.add()
    return found


@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_of_columns_are_mask_gradients(granularity: str, packed: bool) -> None:
    model = make_model()
    if packed:
        use_packed(model)
    batches = [make_batch(seed=s) for s in range(3)]
    wanted = sensitivity(model, batches, granularity=granularity).values
    got = stepped(model, batches, granularity).scores(9.0)
    assert (got.criterion, got.statistic, got.sequence_length) == (
        "mask-gradient",
        "sum_batch_grad_squared",
        9.0,
    )
    for name, value in wanted.items():
        torch.testing.assert_close(got.values[name], value, rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("kind", sorted(DIFFERENCES))
def test_in_every_family(kind: str) -> None:
    model = make(kind, "ForSequenceClassification").eval()
    batch = draw("ForSequenceClassification", kind)
    wanted = sensitivity(model, [batch]).values
    for name, value in stepped(model, [batch]).scores(9.0).values.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-10)


def test_a_frozen_linear_gives_its_units_nothing() -> None:
    model, batch = make_model(), make_batch()
    frozen = model.get_submodule("bert.encoder.layer.0.output.dense")
    frozen.requires_grad_(False)
    found = stepped(model, [batch])
    assert not found.totals["layer.0.neurons"].any()
    assert found.totals["layer.0.heads"].all()
    assert found.totals["layer.1.neurons"].any()
    assert not found.complete
    assert StepScores(make_model(), structure_of(model)).complete


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_adds_nothing(value: float) -> None:
    model, batch = make_model(), make_batch()
    found = stepped(model, [batch])
    before = {name: total.clone() for name, total in found.totals.items()}
    weight = model.get_submodule("bert.encoder.layer.1.output.dense").weight
    assert isinstance(weight.grad, torch.Tensor)
    weight.grad[0, 0] = value
    found.add()
    assert found.steps == 1
    assert all(torch.equal(before[name], total) for name, total in found.totals.items())


def test_state_goes_on_where_it_was() -> None:
    model = make_model()
    batches = [make_batch(seed=s) for s in range(4)]
    whole = stepped(model, batches)
    first = {name: value.clone() for name, value in stepped(model, batches[:2]).state().items()}
    again = StepScores(model, structure_of(model))
    again.load(first)
    for batch in batches[2:]:
        model.zero_grad()
        model(**batch).loss.backward()
        again.add()
    assert all(torch.equal(whole.totals[name], again.totals[name]) for name in whole.totals)
    assert not torch.equal(first["layer.0.heads"], again.totals["layer.0.heads"])
    with pytest.raises(UsageError, match=r"^state: expected sums of "):
        again.load({"layer.0.heads": torch.zeros(1)})
