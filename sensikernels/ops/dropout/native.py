"""Launcher of the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels import _native

DTYPES = (torch.float32, torch.bfloat16)


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why the compiled kernel cannot serve such a tensor; None if it can."""
    if device != "cpu":
        return f"it runs on the CPU, x is on {device}"
    if dtype not in DTYPES:
        return f"it serves float32 and bfloat16, x is {dtype}"
    return None if _native.available() else _native.why_not()


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """As the reference, for contiguous ``x``."""
    y = x.new_empty(x.shape)
    _native.ops().dropout(x, seed, threshold, y)
    return y
