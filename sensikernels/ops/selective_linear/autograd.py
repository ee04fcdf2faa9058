"""Backward of the selective linear. Saved of the input: what the trained entries need, no more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels.layouts import ElementLayout, Layout, kept_values, to_arguments
from sensikernels.ops.common.columns import fused_activation, gather, matrix, unwatched
from sensikernels.ops.selective_linear import ops

_OPS = torch.ops.sensikernels


class SelectiveLinear(torch.autograd.Function):
    """Dense forward and input gradient; weight gradient of the kept entries only.

    ``backend`` names what forms that gradient: ``torch`` (one GEMM on the kept rows and columns,
    all of a compact layout's entries), or ``native`` / ``triton`` (kept blocks only).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layout: Layout,
        activation: str,
        backend: str,
    ) -> Tensor:
        ctx.leading, ctx.layout, ctx.backend = x.shape[:-1], layout, backend
        x2d = matrix(x)
        pre = F.linear(x2d, weight, bias)
        x_needed, _, values_needed = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            gather(x2d, layout.columns) if values_needed else None,
            weight if x_needed else None,
            pre if activation == "gelu" else None,
        )
        y = F.gelu(pre) if activation == "gelu" else pre
        return y.view(*ctx.leading, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The wrapper costs as much as a small product; it says no to a second derivative.
        return (_once if torch.is_grad_enabled() else _backward)(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    read, weight, pre = ctx.saved_tensors
    bias_needed = ctx.needs_input_grad[3]
    dy = matrix(grad)
    dx = dvalues = dbias = None
    if pre is not None:
        dy, dbias = _through_gelu(dy, pre, ctx.backend, bias_needed)
    elif bias_needed:
        dbias = dy.sum(0)
    if weight is not None:
        dx = torch.mm(dy, weight).view(*ctx.leading, weight.shape[1])
    if read is not None:
        dvalues = _grad_values(dy, read, ctx.layout, ctx.backend)
    return dx, None, dvalues, dbias if bias_needed else None, None, None, None


_once = once_differentiable(_backward)


def _through_gelu(
    dy: Tensor, pre: Tensor, backend: str, bias_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """``(dpre, its sum over tokens)``; on a GPU in one pass."""
    if backend == "triton" or fused_activation(dy):
        dpre, dbias = _OPS.selective_grad_activation(dy, pre, "triton")
        return dpre, dbias
    dpre = torch.ops.aten.gelu_backward(dy, pre)
    return dpre, dpre.sum(0) if bias_needed else None


def _grad_values(dy: Tensor, read: Tensor, layout: Layout, backend: str) -> Tensor:
    if isinstance(layout, ElementLayout):
        return kept_values(dy.T @ read, layout)
    dy = gather(dy, layout.rows)
    if backend == "torch":
        return kept_values(torch.mm(dy.t(), read), layout, compact=True)
    if unwatched(dy):
        return ops.grad_values(dy, read, layout, backend)
    return _OPS.selective_grad_values(dy, read, *to_arguments(layout), backend)
