"""The dropout kernel draws the reference's mask, to the bit."""

from __future__ import annotations

import pytest
import torch

from sensikernels.ops.dropout import dropout

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 127, 129, 5000, 128 * 32 + 3])
def test_kernel_is_the_reference(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(n).to(dtype)
    for value in (0, 2**40 + 12345, -1):
        seed = torch.tensor(value, dtype=torch.int64)
        got = dropout(x, 0.1, seed=seed, backend="triton")
        assert torch.equal(got, dropout(x, 0.1, seed=seed, backend="reference"))


def test_backward_draws_the_same_mask() -> None:
    x = torch.randn(300, requires_grad=True)
    y = dropout(x, 0.4, backend="triton")
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)
