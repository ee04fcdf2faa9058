"""Norms of rows of equal elements, and nearly so: exactly 0 where mathematics says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core import extension
from sensikernels.ops.dropout_add_norm import dropout_add_norm
from sensikernels.ops.embed_norm import embed_norm

needs_native = pytest.mark.skipif(
    extension.why_not() is not None, reason=f"native: {extension.why_not()}"
)
WIDTHS = (1, 2, 3, 10, 17, 33, 100, 384, 768, 1000)
Norm = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def summed(rows: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return dropout_add_norm(torch.zeros_like(rows), rows, weight, bias, eps=1e-12, backend=backend)


def looked_up(rows: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    ids, zeros = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
    tables = rows, torch.zeros_like(rows[:1]), torch.zeros_like(rows[:1])
    return embed_norm(ids, zeros, zeros, *tables, weight, bias, eps=1e-12, backend=backend)


def through_operator(rows: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    zeros = torch.zeros_like(rows)
    call = (zeros, rows, weight, bias, None, 65536, 1e-12, True, backend)
    return torch.ops.sensikernels.dropout_add_norm(*call)[0]


def constants(width: int, dtype: torch.dtype) -> Tensor:
    """Rows of one value each, of every size a float has."""
    values = torch.cat([torch.randn(40), torch.logspace(-30, 30, 41), -torch.logspace(-9, 9, 19)])
    return values.to(dtype)[:, None].expand(-1, width).contiguous()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [summed, looked_up, through_operator])
def test_a_constant_row_is_the_bias(norm: Norm, dtype: torch.dtype):
    for width in WIDTHS:
        rows, bias = constants(width, dtype), torch.randn(width).to(dtype)
        got = norm(rows, torch.ones(width), bias.float(), "native")
        assert torch.equal(got, bias.expand_as(got)), width
        # PyTorch's own squares overflow beyond.
        got = norm(rows[rows[:, 0].abs() < 1e15], torch.ones(width), bias.float(), "reference")
        assert torch.equal(got, bias.expand_as(got)), width


@needs_native
@pytest.mark.parametrize("norm", [summed, looked_up])
def test_a_nearly_constant_row_is_as_good_as_torchs(norm: Norm):
    for width, spread in product(WIDTHS[1:], (None, 1e-5, 1e-3, 0.02, 0.1)):
        rows = constants(width, torch.float32)[:40]
        if spread is None:  # by one unit in the last place
            rows = torch.where(torch.rand(rows.shape) < 0.3, torch.nextafter(rows, 2 * rows), rows)
        else:
            rows = rows * (1 + spread * torch.randn(rows.shape))
        weight, bias = torch.ones(width), torch.zeros(width)
        exact = F.layer_norm(rows.double(), (width,), eps=1e-12)
        theirs = (F.layer_norm(rows, (width,), eps=1e-12) - exact).abs().max()
        mine = (norm(rows, weight, bias, "native") - exact).abs().max()
        assert mine <= 2 * theirs + 1e-6, (width, spread)


@needs_native
def test_rows_too_large_to_square():
    rows = torch.tensor([[3e30] * 5, [1e30, -1e30, 1e30, 1e30, 0.0], [torch.inf, 0, 0, 0, 0]])
    got = summed(rows, torch.ones(5), torch.zeros(5), "native")
    assert torch.equal(got[:2], torch.zeros(2, 5))  # a deviation of infinity has no inverse
    assert got[2].isnan().all()
