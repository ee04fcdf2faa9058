"""Backward draws the dropout again and computes the probabilities again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.varlen_attention import ops

_OPS = torch.ops.sensikernels


class VarlenAttention(torch.autograd.Function):
    """Saves q, k, v and the logsumexp; the flash kernel's backward reads the output too."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_query: Tensor | None,
        cu_key: Tensor,
        seed: Tensor,
        lengths: tuple[int, int],
        threshold: int,
        scale: float,
        backend: str,
    ) -> Tensor:
        operands = (query, key, value, cu_query, cu_key, seed)
        out: Tensor
        run = ops.launch_forward if unwatched(query) else _OPS.varlen_attention
        out, lse, state = run(*operands, *lengths, threshold, scale, backend)
        read = out if backend == "flash" else out.new_empty(0)
        ctx.save_for_backward(read, lse, state, *operands)
        ctx.rest = (*lengths, threshold, scale, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = ops.launch_backward if unwatched(grads[0]) else _OPS.varlen_attention_backward
        dq, dk, dv = run(grads[0], *ctx.saved_tensors, *ctx.rest)
        return (dq, dk, dv, *(None,) * 7)
