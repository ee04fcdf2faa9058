"""``dropout`` against PyTorch's, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import dropout

P = 0.1


def counted(x: Tensor) -> Tensor:
    return dropout(x, P)


def drawn(x: Tensor) -> Tensor:
    return functional.dropout(x, P)


@contestants("torch", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dropout(benchmark: Any, device: str, dtype: torch.dtype, name: str) -> None:
    x = normal(1024, 768, dtype=dtype, device=device)
    runs = {OURS: forward_backward(counted, [x])}
    if name != OURS:
        runs[name] = forward_backward(drawn, [x], compiled=name == COMPILED)
    # Two generators drop other elements: what is dropped is for the operator's tests to say.
    measure(benchmark, f"dropout 1024x768 {dtype}", name, runs, tolerance=None)
