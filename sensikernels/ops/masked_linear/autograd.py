"""Backward of the masked linear. Saved: the input as the GEMM read it, and the pre-activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels._columns import gather, matrix, scatter
from sensikernels.layouts import BlockLayout, PackedLayout, to_arguments
from sensikernels.ops.masked_linear import ops as _registered  # noqa: F401

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
        ctx.leading, ctx.layout = x.shape[:-1], layout
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
        return scatter(y, rows, layout.out_width, fill).view(*ctx.leading, layout.out_width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, values, pre, fill = ctx.saved_tensors
        layout: PackedLayout = ctx.layout
        full = matrix(grad)
        dy = gather(full, layout.scatter_rows)
        if pre is not None:
            dy = _gelu_backward(dy, pre)
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = scatter(dy @ values, layout.gather_columns, layout.in_width)
            dx = dx.view(*ctx.leading, layout.in_width)
        if ctx.needs_input_grad[1]:
            dvalues = dy.T @ read
        if ctx.needs_input_grad[2]:
            if layout.scatter_rows is None or pre is None:
                dbias = (dy if layout.scatter_rows is None else full).sum(0)
            else:
                dbias = _gelu_backward(full.sum(0), fill)
                dbias = dbias.index_copy(0, layout.scatter_rows.long(), dy.sum(0))
        return dx, dvalues, dbias, None, None


class KernelLinear(torch.autograd.Function):
    """One operator each for forward, input gradient and gradient of the kept entries."""

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
        ctx.leading, ctx.backend = x.shape[:-1], backend
        ctx.layout = to_arguments(layout)
        x2d = matrix(x)
        y, pre = _OPS.masked_linear(x2d, values, bias, *ctx.layout, activation, backend)
        x_needed, values_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x2d if values_needed else None,
            values if x_needed else None,
            pre if activation == "gelu" else None,
        )
        return y.view(*ctx.leading, layout.out_width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, pre = ctx.saved_tensors
        dy = matrix(grad)
        dx = dvalues = dbias = None
        if pre is not None:
            dy, dbias = _OPS.masked_linear_grad_activation(dy, pre, ctx.backend)
        elif ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        if ctx.needs_input_grad[0]:
            dx = _OPS.masked_linear_grad_input(dy, values, *ctx.layout, ctx.backend)
            dx = dx.view(*ctx.leading, dx.shape[1])
        if ctx.needs_input_grad[1]:
            dvalues = _OPS.masked_linear_grad_values(dy, x, *ctx.layout, ctx.backend)
        return dx, dvalues, dbias if ctx.needs_input_grad[2] else None, None, None, None
