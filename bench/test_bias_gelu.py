"""``bias_gelu`` against PyTorch's sum and GELU, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import bias_gelu


def torch_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


@contestants("torch", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1536, 3072])
def test_bias_gelu(benchmark: Any, device: str, width: int, dtype: torch.dtype, name: str) -> None:
    inputs = [normal(*shape, dtype=dtype, device=device) for shape in ((512, width), (width,))]
    runs = {OURS: forward_backward(bias_gelu, inputs)}
    if name != OURS:
        runs[name] = forward_backward(torch_bias_gelu, inputs, compiled=name == COMPILED)
    measure(benchmark, f"bias_gelu 512x{width} {dtype}", name, runs, tolerance=2e-2)
