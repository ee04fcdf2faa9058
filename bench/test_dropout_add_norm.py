"""``dropout_add_norm`` against PyTorch's sum and LayerNorm, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import dropout_add_norm


@contestants("torch", COMPILED)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [384, 768])
def test_dropout_add_norm(
    benchmark: Any, device: str, hidden: int, dtype: torch.dtype, p: float, name: str
) -> None:
    shapes = ((1024, hidden), (1024, hidden), (hidden,), (hidden,))
    inputs = [normal(*shape, dtype=dtype, device=device) for shape in shapes]

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dropout_add_norm(x, residual, weight, bias, dropout=p)

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = residual + functional.dropout(x, p)
        return functional.layer_norm(total, (hidden,), weight, bias, 1e-12)

    wide = [x.detach().float().requires_grad_() for x in inputs]
    runs = {OURS: forward_backward(ours, inputs)}
    if name != OURS:
        runs[name] = forward_backward(theirs, inputs, compiled=name == COMPILED)
    measure(
        benchmark,
        f"dropout_add_norm 1024x{hidden} p={p:g} {dtype}",
        name,
        runs,
        tolerance=None if p else 5e-2,
        truth=forward_backward(theirs, wide),  # torch sums bfloat16 gradients in bfloat16
    )
