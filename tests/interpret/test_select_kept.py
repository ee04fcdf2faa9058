"""The Triton twins of the selection in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sensikernels.ops.select_kept import reference, select_elements
from sensikernels.ops.select_kept.elements import NEEDS_GRAD, SCORES
from tests.ops.select_kept.cases import entries

pytestmark = pytest.mark.interpret
SHAPES = [(37, 91), (5,), (9_000,), (1,), (0, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_elements_equal_the_sort(score: str, dtype: torch.dtype):
    tensors, grads = entries(SHAPES, dtype), None
    if score in NEEDS_GRAD:
        grads = entries(SHAPES, torch.float32)
    total = sum(t.numel() for t in tensors)
    for k in (0, 1, total // 10, total, [300, 5, 0, 1, 0]):
        scope = "global" if isinstance(k, int) else "per_tensor"
        arguments = {"k": k, "score": score, "scope": scope}
        got = select_elements(tensors, grads, backend="triton", **arguments)
        want = select_elements(tensors, grads, backend="reference", **arguments)
        assert torch.equal(got.arena, want.arena)
        assert torch.equal(got.counts, want.counts)
        torch.testing.assert_close(got.threshold, want.threshold, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("n", [1, 1000, 3000])
def test_fill_in_order(n: int, prefix: bool):
    from sensikernels.ops.select_kept import triton as kernels

    torch.manual_seed(n)
    cost = torch.randint(0, 40, (n,)).double()
    segment, free = torch.randint(0, 9, (n,)), torch.rand(n) < 0.9
    for share in (0.0, 0.3, 0.9, 1.0):
        left = (cost.sum() * share).floor()
        got = kernels.fill_in_order(cost, segment, free, left, prefix, 9)
        assert torch.equal(got, reference.fill_in_order(cost, segment, free, left, prefix, 9))
