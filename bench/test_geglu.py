"""``geglu`` against PyTorch's sum, GELU and product, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import geglu


def torch_geglu(x: Tensor) -> Tensor:
    activated, gate = x.chunk(2, -1)
    return functional.gelu(activated) * gate


@contestants("torch", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1152, 2624])
def test_geglu(benchmark: Any, device: str, width: int, dtype: torch.dtype, name: str) -> None:
    inputs = [normal(512, 2 * width, dtype=dtype, device=device)]
    runs = {OURS: forward_backward(geglu, inputs)}
    if name != OURS:
        runs[name] = forward_backward(torch_geglu, inputs, compiled=name == COMPILED)
    measure(benchmark, f"geglu 512x{width} {dtype}", name, runs, tolerance=2e-2)
