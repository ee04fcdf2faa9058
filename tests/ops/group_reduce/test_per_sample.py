"""Squares of per-sample gradients: exact, and none of the quantities they are mistaken for."""

from __future__ import annotations

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.ops.group_reduce import per_sample, per_sample_grad_squared
from sensikernels.ops.group_reduce.reference import reduce_blocks

GROUPS = {
    "element": (1, 1),
    "tensor": (12, 10),
    "row": (1, 10),
    "column": (12, 1),
    ("head", 4): (4, 10),
    ("head", 5, 1): (12, 5),
    ("block", 5, 3): (5, 3),
}


def by_autograd(x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
    """Σ over samples of the squared gradient, one backward pass per sample."""
    total = torch.zeros(grad_y.shape[-1], x.shape[-1], dtype=x.dtype)
    for x_b, g_b in zip(x, grad_y, strict=True):
        weight = torch.zeros_like(total, requires_grad=True)
        (x_b @ weight.t()).backward(g_b)
        total += weight.grad.square()
    return total


@pytest.mark.parametrize("tokens", [None, 1, 3, 40])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_equals_one_backward_per_sample(group, tokens):
    shape = (6,) if tokens is None else (6, tokens)
    x = torch.randn(*shape, 10, dtype=torch.float64)
    grad_y = torch.randn(*shape, 12, dtype=torch.float64)
    exact = by_autograd(x, grad_y)
    bm, bn = GROUPS[group]
    want = reduce_blocks(exact, bm, bn, largest=False)
    got = per_sample_grad_squared(x, grad_y, groups=group)
    torch.testing.assert_close(got.reshape(-1), want)
    assert got.dtype == torch.float64


def test_both_ways_are_taken():
    assert per_sample.gram_is_cheaper(3, 10, 12)
    assert not per_sample.gram_is_cheaper(40, 10, 12)


def test_three_quantities_differ():
    x, g = torch.randn(5, 7, 10), torch.randn(5, 7, 12)
    per_sample_squares = per_sample_grad_squared(x, g, groups="tensor")
    batch = torch.einsum("bti,bto->oi", x, g).square().sum()
    factorised = (g.flatten(0, 1).square().t() @ x.flatten(0, 1).square()).sum()
    assert not torch.isclose(per_sample_squares, batch, rtol=1e-2)
    assert not torch.isclose(per_sample_squares, factorised, rtol=1e-3)


def test_ones_give_the_bias_and_autocast_changes_nothing():
    g = torch.randn(4, 6, 12)
    ones = torch.ones(4, 6, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bias = per_sample_grad_squared(ones, g, groups="row")
    torch.testing.assert_close(bias, g.sum(1).square().sum(0))


def test_refuses_shapes_that_do_not_pair_up():
    with pytest.raises(UsageError, match="grad_y: expected shape"):
        per_sample_grad_squared(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
