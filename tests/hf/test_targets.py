"""The units that can be trimmed of a BERT, and their FLOPs, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import structure_of, training_flops
from tests.hf.conftest import make_batch, make_model


@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_formula_is_what_is_counted(task: str, granularity: str, dropout: float) -> None:
    model, batch = make_model(task, dropout=dropout), make_batch(task)
    counted = training_flops(model, batch) / batch["input_ids"].numel()
    length = batch["input_ids"].shape[1]
    assert structure_of(model, granularity).flops(length) == pytest.approx(counted, rel=1e-9)


def test_params_leave_out_the_embeddings() -> None:
    model = make_model()
    expected = sum(p.numel() for n, p in model.named_parameters() if "embeddings." not in n)
    assert structure_of(model).params() == structure_of(model, "dimensions").params() == expected


def test_counting_leaves_the_model_alone() -> None:
    model, batch = make_model(dropout=0.1).eval(), make_batch()
    weight = model.get_parameter("classifier.weight")
    weight.grad = torch.ones_like(weight)
    before = torch.get_rng_state()
    training_flops(model, batch)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "classifier.weight")
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match=r"laid out like BERT's.*got Sequential"):
        structure_of(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UsageError, match="granularity: expected one of dimensions, heads"):
        structure_of(make_model(), "rows")
