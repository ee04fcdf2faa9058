"""Rows that wait are where a dense AdamW has them, under every schedule of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from sensikernels._core.errors import UsageError
from sensikernels.optim import SubsetAdamW, waiting

ROWS, WIDE, STEPS = 40, 4, 60
BASE = 1e-2
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: schedules.ConstantLR(o, factor=1.0),
    "ConstantLR": lambda o: schedules.ConstantLR(o, factor=0.2, total_iters=20),
    "LinearLR": lambda o: schedules.LinearLR(o, 1.0, 0.1, total_iters=STEPS),
    "StepLR": lambda o: schedules.StepLR(o, 15, gamma=0.2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [7, 30], gamma=0.1),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, STEPS, power=2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 13),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, step_size_up=5),
    "CyclicLR triangular2": lambda o: schedules.CyclicLR(
        o, 1e-3, 1e-2, step_size_up=4, mode="triangular2", cycle_momentum=False
    ),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "LambdaLR warm-up": lambda o: schedules.LambdaLR(
        o, lambda s: s / 10 if s < 10 else max(0.0, (STEPS - s) / (STEPS - 10))
    ),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda s: 0.5 if s % 9 == 0 else 1),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.01, 1.0, 8), schedules.CosineAnnealingLR(o, STEPS)], [8]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ExponentialLR(o, 0.97), schedules.StepLR(o, 20, 0.3)]
    ),
}


def set_group(**named: Any) -> Callable[[Any, int], None]:
    def change(optimizer: Any, step: int) -> None:
        if step == STEPS // 3:
            for group in optimizer.param_groups:
                group.update(named)

    return change


CHANGES: dict[str, Callable[[Any, int], None]] = {
    "betas": set_group(betas=(0.7, 0.98)),
    "beta1 zero": set_group(betas=(0.0, 0.999)),
    "weight_decay": set_group(weight_decay=0.3),
    "eps": set_group(eps=1e-6),
    "lr zero": set_group(lr=0.0),
    "lr up": set_group(lr=0.1),
}


def pair(decay: float = 0.1) -> tuple[tuple[nn.Embedding, Any], tuple[nn.Embedding, Any]]:
    torch.manual_seed(0)
    dense = nn.Embedding(ROWS, WIDE).double()
    sparse = copy.deepcopy(dense)
    sparse.sparse = True
    return (
        (dense, torch.optim.AdamW(dense.parameters(), lr=BASE, weight_decay=decay)),
        (sparse, SubsetAdamW(sparse.parameters(), lr=BASE, weight_decay=decay)),
    )


def step(table: nn.Embedding, optimizer: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, ROWS, (4,), generator=generator)
    noise = torch.randn(4, WIDE, generator=generator).double()
    (table(ids) * noise).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def gap(dense: nn.Embedding, sparse: nn.Embedding, start: torch.Tensor) -> float:
    """The largest difference over the largest way that dense AdamW went."""
    moved = float((dense.weight.detach() - start).abs().max())
    return float((dense.weight.detach() - sparse.weight.detach()).abs().max()) / moved


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name: str) -> None:
    (dense, theirs), (sparse, ours) = pair()
    start = dense.weight.detach().clone()
    made = [SCHEDULES[name](optimizer) for optimizer in (theirs, ours)]
    for number in range(STEPS):
        step(dense, theirs, number)
        step(sparse, ours, number)
        for schedule in made:
            schedule.step()
    ours.flush()
    # Half a percent of the rate's course is what a line may be off by; eps is the rest.
    assert gap(dense, sparse, start) < 5e-3


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_a_group(name: str) -> None:
    (dense, theirs), (sparse, ours) = pair()
    start = dense.weight.detach().clone()
    for number in range(STEPS):
        for table, optimizer in ((dense, theirs), (sparse, ours)):
            CHANGES[name](optimizer, number)
            step(table, optimizer, number)
    ours.flush()
    assert gap(dense, sparse, start) < 5e-3


def test_a_plateau() -> None:
    (dense, theirs), (sparse, ours) = pair()
    start = dense.weight.detach().clone()
    made = [schedules.ReduceLROnPlateau(o, patience=3, factor=0.1) for o in (theirs, ours)]
    for number in range(STEPS):
        step(dense, theirs, number)
        step(sparse, ours, number)
        for schedule in made:
            schedule.step(1.0)
    ours.flush()
    assert gap(dense, sparse, start) < 5e-3


@pytest.mark.parametrize("name", ["LinearLR", "CosineAnnealingLR", "OneCycleLR", "StepLR"])
def test_a_checkpoint_goes_on_to_the_bit(name: str) -> None:
    _, (table, optimizer) = pair()
    schedule = SCHEDULES[name](optimizer)
    for number in range(STEPS // 2):
        step(table, optimizer, number)
        schedule.step()
    saved = copy.deepcopy((table.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    _, (other, resumed) = pair()
    again = SCHEDULES[name](resumed)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    for number in range(STEPS // 2, STEPS):
        for one, ours, own in ((table, optimizer, schedule), (other, resumed, again)):
            step(one, ours, number)
            own.step()
    optimizer.flush()
    resumed.flush()
    assert torch.equal(table.weight, other.weight)


def test_a_straight_line_is_not_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant rate and a line have no kink, a warm-up from 0 has two."""
    for name, kinks in (("constant", 0), ("LinearLR", 0), ("LambdaLR warm-up", 2)):
        _, (table, optimizer) = pair()
        schedule = SCHEDULES[name](optimizer)
        with monkeypatch.context() as patched:
            flushed = Mock(wraps=waiting.catch_up)
            patched.setattr(waiting, "catch_up", flushed)
            for number in range(STEPS - 10):
                step(table, optimizer, number)
                schedule.step()
        assert flushed.call_count <= kinks, name


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_what_it_does_not_do_is_refused(option: str) -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(UsageError, match=f"{option}: expected False"):
        SubsetAdamW([{"params": [param], option: True}])
    SubsetAdamW([{"params": [param], option: False}])
    theirs = torch.optim.AdamW([param], **{option: True})
    ours = SubsetAdamW([param])
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(UsageError, match=f"{option}: expected False"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_torchs_state_is_taken_over(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(6, 5).to(dtype))
    theirs = kind([one], lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        one.grad = torch.full_like(one, 0.1 * (seed + 1))
        theirs.step()
    two = nn.Parameter(one.detach().clone())
    ours = SubsetAdamW([two], lr=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-2
    assert ours.param_groups[0]["mode"] == "hard_freeze"
    for param, optimizer in ((one, theirs), (two, ours)):
        param.grad = torch.full_like(param, -0.3)
        optimizer.step()
    close = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(one, two, rtol=close, atol=close)


def others() -> dict[str, Any]:
    return {
        "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
        "Adagrad": torch.optim.Adagrad,
        "RMSprop": torch.optim.RMSprop,
        "Adafactor": torch.optim.Adafactor,
        "NAdam": torch.optim.NAdam,
        "Adamax": torch.optim.Adamax,
    }


@pytest.mark.parametrize("name", others())
def test_state_of_another_optimizer_is_refused_at_load(name: str) -> None:
    param = nn.Parameter(torch.randn(4, 3))
    theirs = others()[name]([param])
    param.grad = torch.ones_like(param)
    theirs.step()
    ours = SubsetAdamW([param], lr=0.25)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(UsageError, match="state_dict: expected"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == before
    ours.step()


def test_state_of_another_shape_is_refused_at_load() -> None:
    big, small = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3))
    first, second = SubsetAdamW([big]), SubsetAdamW([small])
    big.grad = torch.ones_like(big)
    first.step()
    with pytest.raises(UsageError, match=r"exp_avg: expected \[2, 3\], got \[4, 3\]"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(UsageError, match=r"state_dict: expected groups of \[1\] parameters"):
        second.load_state_dict(SubsetAdamW([big, small]).state_dict())
    assert not second.state
