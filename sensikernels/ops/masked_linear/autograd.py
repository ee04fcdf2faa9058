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

from sensikernels._columns import fused_activation, gather, matrix, scatter, unwatched
from sensikernels.layouts import BlockLayout, PackedLayout, to_arguments
from sensikernels.ops.masked_linear import ops

_OPS = torch.ops.sensikernels
_gelu_backward = torch.ops.aten.gelu_backward


class PackedLinear(torch.autograd.Function):
    """Gather columns, GEMM on the kept entries, scatter to full width."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layout: PackedLayout,
        activation: str,
    ) -> Tensor:
        rows, gelu = layout.scatter_rows, activation == "gelu"
        ctx.shape, ctx.layout = x.shape, layout
        read = gather(matrix(x), layout.gather_columns)
        bias_kept = bias if bias is None or rows is None else bias.index_select(0, rows)
        pre = F.linear(read, values, bias_kept)
        fill = bias if rows is not None else None
        x_needed, values_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            read if values_needed else None,
            values if x_needed else None,
            pre if gelu else None,
            fill if gelu else None,
        )
        y = F.gelu(pre) if gelu else pre
        fill = F.gelu(fill) if gelu and fill is not None else fill
        y = scatter(y, rows, layout.out_width, fill)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], layout.out_width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, values, pre, fill = ctx.saved_tensors
        layout: PackedLayout = ctx.layout
        x_needed, values_needed, bias_needed = ctx.needs_input_grad[:3]
        full = matrix(grad)
        dy = gather(full, layout.scatter_rows)
        dx = dvalues = dkept = dbias = None
        if pre is not None:
            dy, dkept = _through_gelu(dy, pre, bias_needed)
        if x_needed:
            dx = scatter(dy @ values, layout.gather_columns, layout.in_width)
            dx = dx if grad.ndim == 2 else dx.view(ctx.shape)
        if values_needed:
            dvalues = dy.T @ read
        if bias_needed:
            if dkept is None:
                dbias = full.sum(0)
            elif layout.scatter_rows is None:
                dbias = dkept
            else:
                dbias = _gelu_backward(full.sum(0), fill)
                dbias = dbias.index_copy(0, layout.scatter_rows.long(), dkept)
        return dx, dvalues, dbias, None, None


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
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layout: PackedLayout | BlockLayout,
        activation: str,
        backend: str,
    ) -> Tensor:
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, pre = ctx.saved_tensors
        layout, backend = ctx.layout, ctx.backend
        x_needed, values_needed, bias_needed = ctx.needs_input_grad[:3]
        dy, direct = matrix(grad), unwatched(grad)
        index = () if direct else to_arguments(layout)
        dx = dvalues = dbias = None
        if pre is not None:
            through = ops.grad_activation if direct else _OPS.masked_linear_grad_activation
            dy, dbias = through(dy, pre, backend)
        elif bias_needed:
            dbias = dy.sum(0)
        if x_needed:
            if direct:
                dx = ops.grad_input(dy, values, layout, backend)
            else:
                dx = _OPS.masked_linear_grad_input(dy, values, *index, backend)
            dx = dx if grad.ndim == 2 else dx.view(ctx.shape)
        if values_needed:
            if direct:
                dvalues = ops.grad_values(dy, x, layout, backend)
            else:
                dvalues = _OPS.masked_linear_grad_values(dy, x, *index, backend)
        return dx, dvalues, dbias if bias_needed else None, None, None, None
