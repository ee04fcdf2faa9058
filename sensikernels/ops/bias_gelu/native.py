"""Launchers of the compiled kernels: the reference's functions, of contiguous matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x + bias)`` of ``x [rows, width]``."""
    y = x.new_empty(x.shape)
    launcher("bias_gelu")(x, None if bias is None else bias.float(), y)
    return y


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """``(dx, dbias)`` of ``dy`` and ``x`` ``[rows, width]``; dbias is empty unless needed."""
    dx = x.new_empty(x.shape)
    if bias is None or not bias_needed:
        wide = None if bias is None else bias.float()
        launcher("bias_gelu_backward")(dy, x, wide, dx, None)
        return dx, x.new_empty(0)
    dbias = bias.new_empty(bias.shape, dtype=torch.float32)
    launcher("bias_gelu_backward")(dy, x, bias.float(), dx, dbias)
    return dx, dbias.to(bias.dtype)
