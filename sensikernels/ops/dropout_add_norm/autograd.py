"""Saves the sum, two numbers a row and the seed; the mask is drawn again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels._columns import unwatched
from sensikernels.ops.dropout_add_norm import ops

_OPS = torch.ops.sensikernels


class DropoutAddNorm(torch.autograd.Function):
    """Once differentiable; the reference is differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        seed: Tensor | None,
        threshold: int,
        eps: float,
        backend: str,
    ) -> Tensor:
        save = any(ctx.needs_input_grad)
        run = ops.forward if unwatched(x) else _OPS.dropout_add_norm
        y, total, moments = run(x, residual, weight, bias, seed, threshold, eps, save, backend)
        ctx.save_for_backward(total, moments, weight, seed)
        ctx.threshold, ctx.backend, ctx.bias_dtype = threshold, backend, bias.dtype
        out: Tensor = y
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, moments, weight, seed = ctx.saved_tensors
        x_needed, residual_needed, weight_needed, bias_needed = ctx.needs_input_grad[:4]
        mask = seed if x_needed else None
        run = ops.backward if unwatched(dy) else _OPS.dropout_add_norm_backward
        dx, dresidual, daffine = run(
            dy, total, moments, weight, mask, ctx.threshold if x_needed else 65536,
            weight_needed or bias_needed, ctx.backend,
        )  # fmt: skip
        return (
            (dresidual if mask is None else dx) if x_needed else None,
            dresidual if residual_needed else None,
            daffine[0].to(weight.dtype) if weight_needed else None,
            daffine[1].to(ctx.bias_dtype) if bias_needed else None,
            *[None] * 4,
        )
