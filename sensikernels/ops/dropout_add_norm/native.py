"""Launchers of the compiled kernels: as the reference, for contiguous matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._columns import launcher


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total = x.new_empty(x.shape), x.new_empty(x.shape) if save else None
    moments = x.new_empty((x.shape[0], 2), dtype=torch.float32)
    launcher("dropout_add_norm")(
        x, residual, weight.float(), bias.float(), seed, threshold, eps, y, total, moments
    )
    return y, x.new_empty(0) if total is None else total, moments


def backward(
    dy: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = dy.new_empty(dy.shape)
    dx = None if seed is None else dy.new_empty(dy.shape)
    daffine = moments.new_empty((2, dy.shape[1])) if affine_needed else None
    launcher("dropout_add_norm_backward")(
        dy, total, moments, weight.float(), seed, threshold, dx, dresidual, daffine
    )
    none = moments.new_empty(0)
    return (
        dy.new_empty(0) if dx is None else dx,
        dresidual,
        none if daffine is None else daffine,
    )
