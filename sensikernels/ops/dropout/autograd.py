"""The derivative of dropout, which is dropout of the gradient with the same mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.dropout import ops

_OPS = torch.ops.sensikernels


class Dropout(torch.autograd.Function):
    """Saves the seed, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.threshold, ctx.backend = threshold, backend
        run = ops.launch if unwatched(x) else _OPS.dropout
        out: Tensor = run(x, seed, threshold, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        dx = Dropout.apply(grads[0], seed, ctx.threshold, ctx.backend)  # type: ignore[no-untyped-call]
        return dx, None, None, None
