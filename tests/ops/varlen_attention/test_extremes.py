"""Scores of every size, and sequences of every length, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels.ops.varlen_attention import varlen_attention

pytestmark = pytest.mark.skipif(
    extension.why_not() is not None, reason=f"native: {extension.why_not()}"
)


def run(operands: list[Tensor], cu: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients."""
    *leaves, dout = (t.detach().requires_grad_() for t in operands)
    longest = int(cu.diff().max())
    y = varlen_attention(*leaves, cu, max_length=longest, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, dout)]


def errors(operands: list[Tensor], cu: Tensor, backend: str) -> list[float]:
    exact = run([t.double() for t in operands], cu, "reference")
    got = run(operands, cu, backend)
    return [float((a - b).abs().max()) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scores", [1.0, 1e3, 1e6, 1e9, 1e18, 1e36])
def test_gradients_of_scores_of_any_size(scores: float, dtype: torch.dtype):
    """Rounding a score by a unit of 1e18 must not matter: none but the largest one counts."""
    for size in (3, 16, 64):
        operands = [torch.randn(40, 2, size) for _ in range(4)]
        for t in operands[:2]:
            t.mul_(scores**0.5)
        operands = [t.to(dtype) for t in operands]
        cu = torch.tensor([0, 9, 40], dtype=torch.int32)
        ours, theirs = (errors(operands, cu, b) for b in ("native", "reference"))
        unit = torch.finfo(dtype).eps
        for name, mine, torchs in zip(("y", "dq", "dk", "dv"), ours, theirs, strict=True):
            # Where a key has a share near 1/2 the score's own rounding decides.
            assert mine <= 4 * torchs + 8 * unit, (name, size, mine, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [24, 33, 50, 64])
def test_sequences_of_every_length(size: int, dtype: torch.dtype):
    """No tile of a product writes past its own rows, whatever is left of them."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for length in range(1, 71):
        operands = [torch.randn(length + 15, 1, size).to(dtype) for _ in range(4)]
        cu = torch.tensor([0, length, length + 15], dtype=torch.int32)
        assert max(errors(operands, cu, "native")) < tolerance * length**0.5, length
