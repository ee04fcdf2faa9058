"""Query, key and value as one: the same training as alone, and when they stay alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sensikernels.masks.mask import Mask
from sensikernels.nn import MaskedLinear, SelectiveLinear, grouped_selective_linear
from sensikernels.nn.group import group_refusal

H = 24


def heads(seed: int) -> Mask:
    keep = torch.rand(4, generator=torch.Generator().manual_seed(seed)) < 0.5
    return Mask.heads(keep, (H, H), head_dim=6)


def layers(**options: object) -> list[SelectiveLinear]:
    return [SelectiveLinear.from_linear(nn.Linear(H, H), heads(i), **options) for i in range(3)]


def train(group: list[SelectiveLinear], batches: list[Tensor], *, grouped: bool) -> list[Tensor]:
    optimizer = torch.optim.AdamW([p for one in group for p in one.parameters()], 0.1, fused=True)
    outputs = []
    for x in batches:
        ys = grouped_selective_linear(x, group) if grouped else tuple(one(x) for one in group)
        (ys[0].sin() * ys[1] + ys[2].cos()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs += [y.detach() for y in ys]
    return outputs


@pytest.mark.parametrize("train_bias", [True, False])
def test_training_as_one_is_training_alone(train_bias: bool):
    group = layers(train_bias=train_bias)
    twin = copy.deepcopy(group)
    batches = list(torch.randn(4, 2, 5, H))
    assert group_refusal(batches[0], group) is None
    one, alone = train(group, batches, grouped=True), train(twin, batches, grouped=False)
    torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)
    for a, b in zip(group, twin, strict=True):
        torch.testing.assert_close(a.to_linear().weight, b.to_linear().weight)


def test_blocks_of_different_columns_train_as_one():
    grids = [torch.zeros(3, 3, dtype=torch.bool) for _ in range(3)]
    for grid, kept in zip(grids, ([0, 4], [1, 5], [3, 7]), strict=True):
        grid.view(-1)[kept] = True
    group = [
        SelectiveLinear.from_linear(nn.Linear(H, H), Mask.blocks(g, (8, 8), (H, H))) for g in grids
    ]
    twin = copy.deepcopy(group)
    batches = list(torch.randn(4, 2, 5, H))
    assert group_refusal(batches[0], group) is None
    one, alone = train(group, batches, grouped=True), train(twin, batches, grouped=False)
    torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)


def test_why_layers_stay_alone():
    x, group = torch.randn(3, H), layers()
    frozen = layers()
    frozen[1].values.requires_grad_(False)
    columns = SelectiveLinear.from_linear(
        nn.Linear(H, H), Mask.columns(torch.rand(H) < 0.5, (H, H))
    )
    cases: list[tuple[list[nn.Module], str]] = [
        (group[:1], "two or three"),
        ([*group[:2], nn.Linear(H, H)], "two or three"),
        ([*group[:2], MaskedLinear.from_linear(nn.Linear(H, H), heads(0))], "two or three"),
        (group * 2, "at most 3"),
        (frozen, "trained"),
        ([*group[:2], columns], "different columns"),
        (layers(activation="gelu"), "activation"),
        (layers(backend="reference"), "reference"),
    ]
    for given, message in cases:
        assert message in (group_refusal(x, given) or "")
        for y, one in zip(grouped_selective_linear(x, given), given, strict=True):
            torch.testing.assert_close(y, one(x))
    with torch.no_grad():
        assert "trained" in (group_refusal(x, group) or "")
        assert len(grouped_selective_linear(x, group)) == 3


def test_a_group_follows_its_layers_elsewhere():
    x, group = torch.randn(3, H), layers()
    assert group_refusal(x, group) is None
    moved = [copy.deepcopy(one).double() for one in group]
    assert group_refusal(x.double(), moved) is None
    swapped = [
        group[0],
        SelectiveLinear.from_linear(nn.Linear(H, H), Mask.columns(torch.rand(H) < 0.5, (H, H))),
    ]
    assert "columns" in (group_refusal(x, swapped) or "")
    assert group_refusal(x, group) is None


@pytest.mark.parametrize("kind", ["masked", "selective", "group"])
def test_backward_stops_below_the_lowest_trainable_tensor(kind: str):
    """No gradient of x is formed for the first layer of a model, whose input needs none."""
    T, mask = 7, heads(0)
    kept = sum(heads(i).grid.sum().item() * 6 * H for i in range(3 if kind == "group" else 1))
    if kind == "masked":
        run = MaskedLinear.from_linear(nn.Linear(H, H), mask)
        dense = kept
    elif kind == "selective":
        run = SelectiveLinear.from_linear(nn.Linear(H, H), mask)
        dense = H * H
    else:
        group = layers()
        dense = 3 * H * H

        def run(x: Tensor) -> Tensor:
            return sum(grouped_selective_linear(x, group))

    for needed in (True, False):
        x = torch.randn(T, H, requires_grad=needed)
        with FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        assert counter.get_total_flops() == 2 * T * (dense + kept + (dense if needed else 0))


@pytest.mark.parametrize("kind", [MaskedLinear, SelectiveLinear])
def test_a_frozen_layer_passes_the_gradient_on_and_no_more(kind: type):
    below = nn.Linear(H, H)
    module = kind.from_linear(nn.Linear(H, H), heads(0)).requires_grad_(False)
    kept = int(heads(0).grid.sum()) * 6 * H if kind is MaskedLinear else H * H
    x = torch.randn(7, H)
    with FlopCounterMode(display=False) as counter:
        module(below(x)).sum().backward()
    assert counter.get_total_flops() == 2 * 7 * (2 * H * H + 2 * kept)
    assert below.weight.grad is not None
    with FlopCounterMode(display=False) as counter:
        assert not module(x).requires_grad
    assert counter.get_total_flops() == 2 * 7 * kept
