"""Backward of the masked linear. Saved: the input as the GEMM read it, and the pre-activation.

Launchers are called directly where nothing watches operators; a tracer, a fake tensor or a FLOP
counter sees the registered operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.layouts import CompactLayout, to_arguments
from sensikernels.ops.common.carried import Carried
from sensikernels.ops.common.columns import (
    fused_activation,
    gather,
    matrix,
    scatter,
    scatter_biased,
    serves,
    unwatched,
)
from sensikernels.ops.common.linears import gelu_gradient
from sensikernels.ops.masked_linear import ops

_OPS = torch.ops.sensikernels
_gelu_backward = torch.ops.aten.gelu_backward


class CompactLinear(torch.autograd.Function):
    """Gather columns, GEMM on the kept entries, scatter to full width."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layout: CompactLayout,
        activation: str,
    ) -> Tensor:
        rows, width = layout.scatter_rows, layout.out_width
        ctx.shape, ctx.layout = x.shape, layout
        x_needed, values_needed, *_ = ctx.needs_input_grad
        read = gather(matrix(x), layout.gather_columns)
        if rows is None or bias is None:
            late, kept = False, bias
        else:
            late = activation == "none" and _adds_late(read)
            kept = None if late else bias.index_select(0, rows)
        y = F.linear(read, values, kept)
        saved = (read if values_needed else None, values if x_needed else None)
        if activation == "gelu":
            fill = None if rows is None else bias
            ctx.save_for_backward(*saved, y, fill)
            y = scatter(F.gelu(y), rows, width, None if fill is None else F.gelu(fill))
        else:
            ctx.save_for_backward(*saved)
            if late and rows is not None and bias is not None:
                y = scatter_biased(y, rows, bias)
            else:
                y = scatter(y, rows, width, bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The wrapper costs as much as a small product; it says no to a second derivative.
        return (_once if torch.is_grad_enabled() else _compact_backward)(ctx, grad)


def _adds_late(read: Tensor) -> bool:
    """Whether the scatter adds the bias: nothing to gather, and in float32 no digit is lost."""
    return read.dtype == torch.float32 and serves(read)


def _compact_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    read, values, *through = ctx.saved_tensors
    layout: CompactLayout = ctx.layout
    bias_needed = ctx.needs_input_grad[2]
    full = matrix(grad)
    dy = gather(full, layout.scatter_rows)
    dx = dvalues = dkept = dbias = None
    if through:
        dy, dkept = _through_gelu(dy, through[0], bias_needed)
    if values is not None:
        # mm, not matmul: the latter costs the host a microsecond more.
        dx = scatter(torch.mm(dy, values), layout.gather_columns, layout.in_width)
        dx = dx if grad.ndim == 2 else dx.view(ctx.shape)
    if read is not None:
        dvalues = torch.mm(dy.t(), read)
    if bias_needed:
        if dkept is None:
            dbias = full.sum(0)
        elif layout.scatter_rows is None:
            dbias = dkept
        else:
            dbias = _gelu_backward(full.sum(0), through[1])
            dbias = dbias.index_copy(0, layout.scatter_rows.long(), dkept)
    return dx, dvalues, dbias, None, None


_once = once_differentiable(_compact_backward)


def _through_gelu(dy: Tensor, pre: Tensor, bias_needed: bool) -> tuple[Tensor, Tensor | None]:
    """``(dpre, its sum over tokens)``; on a GPU in one pass."""
    if fused_activation(dy):
        dpre, dbias = _OPS.masked_linear_grad_activation(dy, pre, "triton")
        return dpre, dbias
    dpre = _gelu_backward(dy, pre)
    return dpre, dpre.sum(0) if bias_needed else None


class KernelLinear(torch.autograd.Function):
    """One launch each for forward, input gradient and gradient of the kept entries."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layout: Carried, *how: str
    ) -> Tensor:
        activation, backend = how
        ctx.shape, ctx.layout, ctx.backend = x.shape, layout, backend
        x2d = matrix(x)
        if unwatched(x):
            y, pre = ops.forward(x2d, values, bias, layout, activation, backend)
        else:
            index = to_arguments(layout)
            y, pre = _OPS.masked_linear(x2d, values, bias, *index, activation, backend)
        x_needed, values_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x2d if values_needed else None,
            values if x_needed else None,
            pre if activation == "gelu" else None,
        )
        return y if x.ndim == 2 else y.view(*x.shape[:-1], layout.out_width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (_kernel_once if torch.is_grad_enabled() else _kernel_backward)(ctx, grad)


def _kernel_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, pre = ctx.saved_tensors
    layout, backend = ctx.layout, ctx.backend
    bias_needed = ctx.needs_input_grad[2]
    dy, direct = matrix(grad), unwatched(grad)
    index = () if direct else to_arguments(layout)
    dx = dvalues = dbias = None
    if pre is not None:
        through = gelu_gradient if direct else _OPS.masked_linear_grad_activation
        dy, dbias = through(dy, pre, backend)
    elif bias_needed:
        dbias = dy.sum(0)
    if values is not None:
        if direct:
            dx = ops.grad_input(dy, values, layout, backend)
        else:
            dx = _OPS.masked_linear_grad_input(dy, values, *index, backend)
        dx = dx if grad.ndim == 2 else dx.view(ctx.shape)
    if x is not None:
        if direct:
            dvalues = ops.grad_values(dy, x, layout, backend)
        else:
            dvalues = _OPS.masked_linear_grad_values(dy, x, *index, backend)
    return dx, dvalues, dbias if bias_needed else None, None, None, None


_kernel_once = once_differentiable(_kernel_backward)
