"""The derivative, which draws the dropout and computes the probabilities again."""

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
    def forward(ctx: Any, *call: Any) -> Tensor:
        """``call``: the arguments of the operator; the first six are tensors."""
        out: Tensor
        run = ops.launch_forward if unwatched(call[0]) else _OPS.varlen_attention
        out, lse, state = run(*call)
        read = out if call[-1] == "flash" else out.new_empty(0)
        ctx.save_for_backward(read, lse, state, *call[:6])
        ctx.rest = call[6:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = ops.launch_backward if unwatched(grads[0]) else _OPS.varlen_attention_backward
        dq, dk, dv = run(grads[0], *ctx.saved_tensors, *ctx.rest)
        return (dq, dk, dv, *(None,) * 9)
