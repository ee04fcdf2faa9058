"""Launchers of the compiled kernels: the reference's functions, of contiguous matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher
from sensikernels.ops.common.drops import Drop
from sensikernels.ops.common.rowwise import single
from sensikernels.ops.dropout_add_norm.reference import Saved


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, drop: Drop, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    y, total = torch.empty_like(x), torch.empty_like(x) if save else None
    moments = torch.empty(x.shape[0], 2)
    launcher("dropout_add_norm")(
        x, residual, single(weight), single(bias), *drop, eps, y, total, moments
    )
    return y, total, moments


def recovers(weight: Tensor, bias: Tensor) -> bool:
    """True if the output gives the normalised row as well as the sum does: |bias| <= 2 |weight|.

    The output's rounding moves (y - bias) / weight by |n + bias / weight| of its own size, the
    sum's moves n by |n + mean / deviation|.
    """
    found = launcher("dropout_add_norm_recovers")(
        weight.float().contiguous(), bias.float().contiguous()
    )
    return bool(found)


def backward(
    dy: Tensor, saved: Saved, drop: Drop, affine_needed: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    dresidual, dx = torch.empty_like(dy), None if drop.seed is None else torch.empty_like(dy)
    daffine = torch.empty(2, dy.shape[1]) if affine_needed else None
    before, moments, weight, bias = saved
    norm = single(weight), None if bias is None else single(bias)
    launcher("dropout_add_norm_backward")(dy, before, moments, *norm, *drop, dx, dresidual, daffine)
    return dx, dresidual, daffine
