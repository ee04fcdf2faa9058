"""Tensors and arguments that right calls and steps of operators are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS, IN, OUT = 48, 64, 96
"""Sizes of a step."""


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def seed() -> Tensor:
    return torch.tensor(1234)


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device).requires_grad_()


def stepped(out: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


def drops() -> dict[str, Any]:
    """The dropout of an operator."""
    return {"seed": seed(), "threshold": 40000}


def affine() -> dict[str, Tensor]:
    """The weight and the bias of a normalization."""
    return {"weight": floats(8), "bias": floats(8)}


def normalization() -> dict[str, Any]:
    """Arguments that functions with a normalization and dropout have in common."""
    return {**affine(), "dropout": 0.3, "eps": 1e-12, "seed": seed()}
