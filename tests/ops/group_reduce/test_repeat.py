"""``group_reduce`` called again: the shortcut serves what it may, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.group_reduce import GroupTable, group_reduce, ops

pytestmark = pytest.mark.skipif(not extension.available(), reason="no compiled extension")
NAMES = ("sum_abs_wg", "sum_weight_squared")


def fresh(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in ((5, 8), (7,), (3, 4))]


@pytest.fixture
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Results of the shortcut, as they come."""
    taken: list[Tensor] = []
    launch = ops.launch_bound

    def counted(*arguments: object) -> Tensor:
        taken.append(launch(*arguments))
        return taken[-1]

    monkeypatch.setattr(ops, "launch_bound", counted)
    return taken


def check(weights: list[Tensor], grads: list[Tensor] | None, table: GroupTable | None) -> None:
    names = NAMES if grads is not None else NAMES[1:]
    got = group_reduce(weights, grads, names, groups="row", table=table)
    want = group_reduce([w.clone() for w in weights], grads, names, groups="row", backend="native")
    assert torch.equal(got.arena, want.arena)
    assert got.spans == want.spans


def test_fresh_gradients_and_changed_weights(shortcuts: list[Tensor]):
    weights = fresh(0)
    table = GroupTable(weights, fresh(1), groups="row")
    for seed in range(1, 4):
        check(weights, fresh(seed), table)
        weights[0].mul_(2)
    assert len(shortcuts) == 2
    check(weights, None, table)
    assert len(shortcuts) == 3


@pytest.mark.parametrize("given", [True, False])
def test_what_is_not_the_same_call_is_bound_anew(given: bool, shortcuts: list[Tensor]):
    weights = fresh(0)
    table = GroupTable(weights, fresh(1), groups="row") if given else None
    check(weights, fresh(1), table)
    check(weights, fresh(2, torch.bfloat16), table)
    weights[1].data = torch.ones(7)
    check(weights, fresh(3), table)
    weights[0] = weights[0].clone()
    check(weights, fresh(3), table)
    strided = fresh(4)
    strided[0] = strided[0].t().contiguous().t()
    check(weights, strided, table)
    assert not shortcuts
    with pytest.raises(UsageError, match="grads"):
        group_reduce(weights, fresh(5)[::-1], NAMES, groups="row", table=table)
    with pytest.raises(UsageError, match="gradients, which sum_abs_wg needs"):
        group_reduce(weights, None, NAMES, groups="row", table=table)
    assert not shortcuts


def test_without_a_table_nothing_is_remembered(shortcuts: list[Tensor]):
    weights, grads = fresh(0), fresh(1)
    for groups in ("row", "row", "tensor", ["row", "tensor", "column"]):
        group_reduce(weights, grads, groups=groups)
    assert group_reduce(weights, grads, names=["a", "b", "c"]).spans[0].name == "a"
    assert not shortcuts
