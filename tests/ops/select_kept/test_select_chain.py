"""select_chain: the maximum over all subsets, a budget that holds, and both backends alike."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.ops.select_kept import select_chain

BACKENDS = ("native", "reference")
UNIT = st.tuples(st.integers(-2, 20), st.integers(0, 9), st.integers(0, 9))


def cost_of(kept: list[bool], t_dw: list[float], t_dy: list[float]) -> float:
    if not any(kept):
        return 0
    lowest = kept.index(True)
    own = sum(cost for cost, bit in zip(t_dw, kept, strict=True) if bit)
    return own + sum(t_dy[lowest:])


@pytest.mark.parametrize("backend", BACKENDS)
@given(units=st.lists(UNIT, min_size=1, max_size=9), budget=st.integers(0, 60))
def test_the_best_of_every_subset(backend: str, units, budget):
    value, t_dw, t_dy = (list(x) for x in zip(*units, strict=True))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (value, t_dw, t_dy)]
    kept = select_chain(*tensors, budget, bins=max(budget, 1), backend=backend).tolist()
    assert cost_of(kept, t_dw, t_dy) <= budget
    best = max(
        sum(v for v, bit in zip(value, bits, strict=True) if bit)
        for bits in itertools.product((False, True), repeat=len(value))
        if cost_of(list(bits), t_dw, t_dy) <= budget
    )
    assert sum(v for v, bit in zip(value, kept, strict=True) if bit) == best


@given(seed=st.integers(0, 1000), bins=st.sampled_from([1, 10, 1000]))
def test_real_costs_hold_the_budget_and_backends_agree(seed: int, bins: int):
    torch.manual_seed(seed)
    value, t_dw, t_dy = torch.rand(3, 20, dtype=torch.float64)
    budget = float(torch.rand(()) * (t_dw.sum() + t_dy.sum()))
    kept = [select_chain(value, t_dw, t_dy, budget, bins=bins, backend=b) for b in BACKENDS]
    assert torch.equal(*kept)
    spent = cost_of(kept[0].tolist(), t_dw.tolist(), t_dy.tolist())
    assert spent <= budget * (1 + 1e-9)


def test_depth_is_what_costs():
    """The lowest unit is the most important, and reaching it takes all the budget."""
    value, free = torch.tensor([6.0, 1.0, 4.0]), torch.zeros(3)
    reach = torch.ones(3)
    assert select_chain(value, reach, reach, 4.0, bins=4).tolist() == [True, False, False]
    assert select_chain(value, reach, reach, 3.0, bins=3).tolist() == [False, False, True]
    assert select_chain(value, free, free, 0.0).tolist() == [True, True, True]
    assert select_chain(torch.zeros(0), free[:0], free[:0], 1.0).tolist() == []


def test_seventy_five_linears_in_milliseconds():
    torch.manual_seed(0)
    value, t_dw, t_dy = torch.rand(3, 75)
    best = float("inf")
    for _ in range(7):
        start = time.process_time()
        select_chain(value, t_dw, t_dy, 30.0, bins=1000, backend="native")
        best = min(best, time.process_time() - start)
    assert best < 0.005


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t_dw": torch.ones(2)}, r"t_dw: expected shape \(3,\), got \(2,\)"),
        ({"t_dy": -torch.ones(3)}, "t_dy: expected values >= 0"),
        ({"importance": torch.tensor([1.0, float("nan"), 0.0])}, "importance: expected finite"),
        ({"budget": -1.0}, "budget: expected a finite number >= 0, got -1.0"),
        ({"bins": 0}, "bins: expected a number >= 1, got 0"),
        ({"backend": "triton"}, "backend: expected one of"),
    ],
)
def test_refusals(change, message):
    good = {
        "importance": torch.ones(3),
        "t_dw": torch.ones(3),
        "t_dy": torch.ones(3),
        "budget": 2.0,
    }
    with pytest.raises(UsageError, match=message):
        select_chain(**{**good, **change})
