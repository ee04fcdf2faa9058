"""``varlen_attention`` on packed tokens against PyTorch's attention on padded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import varlen_attention

HEADS, SIZE = 12, 64
LENGTHS = {
    "sst2": (5, 9, 12, 14, 18, 22, 27, 40) * 4,
    "full": (128,) * 8,
    "window": (512, 1024),
}
WINDOWS = {"window": 64}
"""A ModernBERT's: 128 tokens of local attention."""


@contestants("torch-padded", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", LENGTHS)
def test_varlen_attention(
    benchmark: Any, device: str, case: str, dtype: torch.dtype, name: str
) -> None:
    lengths = torch.tensor(LENGTHS[case])
    longest, tokens = int(lengths.max()), int(lengths.sum())
    bounds = functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    inputs = [normal(tokens, HEADS, SIZE, dtype=dtype, device=device) for _ in range(3)]
    real = (torch.arange(longest) < lengths[:, None]).to(device)
    place = real.flatten().nonzero().flatten()
    window, mask = WINDOWS.get(case), real[:, None, None]
    if window is not None:
        at = torch.arange(longest, device=device)
        mask = mask & ((at[:, None] - at).abs() <= window)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attention(query, key, value, bounds, max_length=longest, window=window)

    def padded(x: Tensor) -> Tensor:
        full = x.new_zeros(len(lengths) * longest, HEADS, SIZE).index_copy(0, place, x)
        return full.view(len(lengths), longest, HEADS, SIZE).transpose(1, 2)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(
            padded(query), padded(key), padded(value), attn_mask=mask
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, place)

    runs = {OURS: forward_backward(ours, inputs)}
    if name != OURS:
        runs[name] = forward_backward(theirs, inputs, compiled=name == COMPILED)
    measure(benchmark, f"varlen_attention {case} {dtype}", name, runs, tolerance=3e-2)
