"""``embed_norm`` against PyTorch's three embeddings and LayerNorm, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import embed_norm

ROWS, LENGTH, HIDDEN = 32, 32, 768


@contestants("torch", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_embed_norm(benchmark: Any, device: str, dtype: torch.dtype, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30522, (ROWS, LENGTH), generator=generator).to(device)
    positions = torch.arange(LENGTH, device=device).expand(ROWS, LENGTH).contiguous()
    types = torch.zeros_like(ids)
    tables = [normal(n, HIDDEN, dtype=dtype, device=device) for n in (30522, 512, 2)]
    norm = [normal(HIDDEN, dtype=dtype, device=device) for _ in range(2)]

    def ours(word: Tensor, position: Tensor, kind: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return embed_norm(ids, positions, types, word, position, kind, weight, bias)

    def theirs(
        word: Tensor, position: Tensor, kind: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        total = functional.embedding(ids, word) + functional.embedding(types, kind)
        total = total + functional.embedding(positions, position)
        return functional.layer_norm(total, (HIDDEN,), weight, bias, 1e-12)

    inputs = [*tables, *norm]
    runs = {OURS: forward_backward(ours, inputs)}
    if name != OURS:
        runs[name] = forward_backward(theirs, inputs, compiled=name == COMPILED)
    group = f"embed_norm {ROWS}x{LENGTH}x{HIDDEN} {dtype}"
    measure(benchmark, group, name, runs, tolerance=5e-2)
