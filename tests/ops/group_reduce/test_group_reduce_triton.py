"""The Triton kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sensikernels.ops.group_reduce import STATISTICS, GroupTable, group_reduce, reference
from sensikernels.ops.group_reduce.api import zeros
from tests.ops.group_reduce.cases import assert_sums, every_group

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("kind", ["float32", "mixed", "sliced", "special"])
def test_kernels_equal_the_reference(kind: str):
    weights, grads, groups = every_group(((6, 150), (12, 24)), kind)
    got = group_reduce(weights, grads, STATISTICS, groups=groups, backend="triton")
    assert_sums(got.arena, weights, grads, groups)


def test_long_rows_subsets_and_states():
    w, g = torch.randn(2, 70000), torch.randn(2, 70000)
    names = ("sum_abs_wg", "max_abs_grad")
    table = GroupTable([w], [g], groups="tensor")
    running, ema = zeros(table, names), zeros(table, names)
    for _ in range(2):
        got = group_reduce(
            [w], [g], names, table=table, backend="triton", running=running, ema=(ema, 0.5)
        )
    want = reference.group_reduce([w], [g], names, ["tensor"])
    torch.testing.assert_close(got.arena, want)
    torch.testing.assert_close(running.arena, want * torch.tensor([[2.0], [1.0]]))
    torch.testing.assert_close(ema.arena, 0.75 * want)
