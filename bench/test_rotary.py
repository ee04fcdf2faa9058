"""``rotary`` against PyTorch's products and a concatenation, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import rotary

HEADS, SIZE = 12, 64


def torch_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x.float() * cos + turned * sin).to(x.dtype)


@contestants("torch", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [416, 2048])
def test_rotary(benchmark: Any, device: str, tokens: int, dtype: torch.dtype, name: str) -> None:
    fused = normal(tokens, 3 * HEADS, SIZE, dtype=dtype, device=device)
    angle = torch.arange(tokens, device=device)[:, None] * torch.linspace(0.01, 1, SIZE // 2).to(
        device
    )
    cos, sin = angle.cos(), angle.sin()
    wide = [torch.cat([t, t], -1)[:, None] for t in (cos, sin)]
    runs = {OURS: forward_backward(lambda x: rotary(x[:, : 2 * HEADS], cos, sin), [fused])}
    if name != OURS:
        runs[name] = forward_backward(
            lambda x: torch_rotary(x[:, : 2 * HEADS], *wide), [fused], compiled=name == COMPILED
        )
    measure(benchmark, f"rotary {tokens}x24x64 {dtype}", name, runs, tolerance=2e-2)
