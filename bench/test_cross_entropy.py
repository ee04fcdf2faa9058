"""``cross_entropy`` against PyTorch's, forward and backward, over a vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.contest import COMPILED, OURS, contestants, forward_backward, measure, normal
from sensikernels import cross_entropy

CLASSES = 30522


@contestants("torch", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("labelled", [1.0, 0.15])
def test_cross_entropy(
    benchmark: Any, device: str, labelled: float, dtype: torch.dtype, name: str
) -> None:
    logits = normal(256, CLASSES, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (256,), generator=generator)
    labels[torch.rand(256, generator=generator) >= labelled] = -100
    labels = labels.to(device)

    def ours(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def theirs(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), labels)

    runs = {OURS: forward_backward(ours, [logits])}
    if name != OURS:
        runs[name] = forward_backward(theirs, [logits], compiled=name == COMPILED)
    measure(benchmark, f"cross_entropy 256x{CLASSES} {labelled:g} {dtype}", name, runs)
