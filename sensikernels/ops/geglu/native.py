"""Launchers of the compiled kernels: the reference's functions, of contiguous matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher
from sensikernels.ops.common.rowwise import single


def geglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """``[rows, n]`` of ``x [rows, 2 n]``."""
    y = x.new_empty((x.shape[0], x.shape[1] // 2))
    launcher("geglu")(x, None if bias is None else single(bias), y)
    return y


def geglu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """``(dx, dbias)`` of ``dy [rows, n]`` and ``x [rows, 2 n]``; dbias is empty unless needed."""
    dx = x.new_empty(x.shape)
    wide = None if bias is None else single(bias)
    if bias is None or not bias_needed:
        launcher("geglu_backward")(dy, x, wide, dx, None)
        return dx, x.new_empty(0)
    dbias = bias.new_empty(bias.shape, dtype=torch.float32)
    launcher("geglu_backward")(dy, x, wide, dx, dbias)
    return dx, dbias.to(bias.dtype)
