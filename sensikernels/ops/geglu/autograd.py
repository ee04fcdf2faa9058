"""The derivative: saves ``x`` and the bias, and takes both gradients in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.geglu import ops

_OPS = torch.ops.sensikernels


class Geglu(torch.autograd.Function):
    """Once differentiable; the reference is differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.backend = backend
        run = ops.forward if unwatched(x) else _OPS.geglu
        y: Tensor = run(x, bias, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        bias_needed = ctx.needs_input_grad[1]
        run = ops.backward if unwatched(dy) else _OPS.geglu_backward
        dx, dbias = run(dy, x, bias, bias_needed, ctx.backend)
        return dx, dbias if bias_needed else None, None
