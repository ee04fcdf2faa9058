"""The derivative: saves the output or the sum, two numbers a row and the seed, never the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.dropout_add_norm import native, ops

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
        *rest: Any,
    ) -> Tensor:
        seed, threshold, eps, recover, backend = rest
        direct, save = unwatched(x), any(ctx.needs_input_grad)
        if save:
            if recover == "auto":  # where looking at numbers waits for nothing
                save = not (direct and backend == "native" and native.recovers(weight, bias))
            else:
                save = recover == "sum"
        run = ops.launch_forward if direct else _OPS.dropout_add_norm
        y, total, moments = run(x, residual, weight, bias, seed, threshold, eps, save, backend)
        read = (total, None) if save else (y, bias)
        ctx.save_for_backward(*read, moments, weight, seed)
        ctx.threshold, ctx.backend, ctx.bias_dtype = threshold, backend, bias.dtype
        out: Tensor = y
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # The wrapper costs as much as a small row; it says no to a second derivative.
        return (_once if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    before, shift, moments, weight, seed = ctx.saved_tensors
    x_needed, residual_needed, weight_needed, bias_needed = ctx.needs_input_grad[:4]
    affine_needed = weight_needed or bias_needed
    mask, threshold = (seed, ctx.threshold) if x_needed else (None, 65536)
    run = ops.launch_backward if unwatched(dy) else _OPS.dropout_add_norm_backward
    dx, dresidual, daffine = run(
        dy, before, moments, weight, shift, mask, threshold, affine_needed, ctx.backend
    )
    dweight, dbias = (None, None) if daffine is None or not affine_needed else daffine.unbind()
    return (
        (dresidual if mask is None else dx) if x_needed else None,
        dresidual if residual_needed else None,
        None if dweight is None or not weight_needed else dweight.to(weight.dtype),
        None if dbias is None or not bias_needed else dbias.to(ctx.bias_dtype),
        *[None] * 5,
    )


_once = once_differentiable(_backward)
