"""Scores equal the gradients they stand for, taken the long way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import CRITERIA, sensitivity, structure_of
from tests.hf.conftest import make_batch, make_model

GRANULARITIES = ["heads", "dimensions"]


def mask_gradients(
    model: nn.Module, batch: dict[str, Tensor], granularity: str
) -> dict[str, Tensor]:
    """∂L/∂m by autograd, with explicit masks of ones multiplied in by hooks."""
    masks, handles = {}, []
    for coupling in structure_of(model, granularity).couplings:
        mask = masks[coupling.name] = torch.ones(coupling.units, requires_grad=True)
        size = coupling.unit_size
        if coupling.kind == "qk":
            module = model.get_submodule(coupling.members[1].module)  # the key, not the query
            handles.append(module.register_forward_hook(lambda m, i, o, mask=mask: o * mask))
            continue
        module = model.get_submodule(coupling.members[-1].module)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, i, mask=mask, size=size: (i[0] * mask.repeat_interleave(size),)
            )
        )
    loss = model.eval()(**batch).loss
    grads = torch.autograd.grad(loss, list(masks.values()))
    for handle in handles:
        handle.remove()
    return dict(zip(masks, grads, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_mask_gradients_are_autograds(task: str, granularity: str) -> None:
    model = make_model(task)
    batches = [make_batch(task, seed=s) for s in range(2)]
    scores = sensitivity(model, batches, granularity=granularity)
    wanted = [mask_gradients(model, batch, granularity) for batch in batches]
    for name, got in scores.values.items():
        expected = sum(grads[name].double().square() for grads in wanted)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-12)
    assert scores.rows == 8
    assert scores.sequence_length == 9


def test_per_example_squares_are_single_rows() -> None:
    model, batch = make_model(), make_batch()
    got = sensitivity(model, [batch], statistic="sum_grad_squared").values
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    alone = sensitivity(model, rows).values
    for name, value in got.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-12)


def test_first_order_is_weight_times_gradient() -> None:
    model, batch = make_model(), make_batch()
    got = sensitivity(model, [batch], "first-order").values
    model.eval()(**batch).loss.backward()
    for coupling in structure_of(model).couplings:
        expected = torch.zeros(coupling.units, dtype=torch.float64)
        for member in coupling.members:
            weight = model.get_parameter(f"{member.module}.weight")
            lines = (weight * weight.grad).abs().double().sum(1 - member.axis)
            expected += lines.view(coupling.units, -1).sum(1)
        torch.testing.assert_close(got[coupling.name], expected, rtol=1e-5, atol=1e-12)


def test_learned_masks_shrink_by_l1() -> None:
    model, batches = make_model(), [make_batch(seed=s) for s in range(3)]
    strong = sensitivity(model, batches, "learned", learning_rate=1e-2, l1=10.0).values
    assert all(bool((v < 1).all()) for v in strong.values())
    none = sensitivity(model, batches, "learned", learning_rate=1e-2, l1=0.0).values
    assert any(bool((v > 1).any()) for v in none.values())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_left_as_it_was(criterion: str) -> None:
    model = make_model(dropout=0.1).eval()
    frozen = model.get_parameter("classifier.bias").requires_grad_(False)
    frozen.grad = torch.ones_like(frozen)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    sensitivity(model, [make_batch()], criterion)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["classifier.bias"]
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_no_weight_gradient_is_computed() -> None:
    model = make_model()
    seen: list[bool] = []
    module = model.get_submodule("bert.encoder.layer.1.output.dense")
    handle = module.register_forward_hook(
        lambda m, i, o: seen.append(any(p.requires_grad for p in m.parameters()))
    )
    sensitivity(model, [make_batch()])
    handle.remove()
    assert seen == [False]


def test_bad_arguments() -> None:
    model = make_model()
    with pytest.raises(UsageError, match="criterion: expected one of"):
        sensitivity(model, [make_batch()], "fisher")
    with pytest.raises(UsageError, match="statistic: expected one of"):
        sensitivity(model, [make_batch()], statistic="fisher")
    with pytest.raises(UsageError, match="batches: expected at least one batch"):
        sensitivity(model, [])
