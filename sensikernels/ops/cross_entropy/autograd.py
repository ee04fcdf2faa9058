"""The derivative: saves the logits, which exist anyway, and two float32 a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.cross_entropy import ops

_OPS = torch.ops.sensikernels


class CrossEntropy(torch.autograd.Function):
    """Once differentiable; the reference is differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, backend: str
    ) -> Tensor:
        run = ops.forward if unwatched(logits) else _OPS.cross_entropy
        loss, stats, scale = run(logits, labels, ignore_index, backend)
        ctx.save_for_backward(logits, labels, stats, scale)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        out: Tensor = loss
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, stats, scale = ctx.saved_tensors
        run = ops.backward if unwatched(grads[0]) else _OPS.cross_entropy_backward
        dlogits = run(grads[0], logits, labels, stats, scale, ctx.ignore_index, ctx.backend)
        return dlogits, None, None, None
