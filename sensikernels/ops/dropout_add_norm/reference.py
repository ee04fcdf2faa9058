"""The definition, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.philox import DRAWS, dropped


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> Tensor:
    """``LayerNorm(residual + dropout(x)) · weight + bias``, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = _sum(x.to(wide), residual.to(wide), seed, threshold)
    return F.layer_norm(z, z.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(y, sum, moments)`` of matrices: ``sum`` in x's dtype, None unless ``save``.

    ``moments`` is ``[rows, 2]``, mean and 1 / standard deviation, float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = _sum(x.to(wide), residual.to(wide), seed, threshold)
    # Together, by Welford: the mean of a row of equal elements is that element.
    variance, mean = torch.var_mean(z, 1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    y = (z - mean) * rstd * weight + bias
    return y.to(x.dtype), z.to(x.dtype) if save else None, torch.cat([mean, rstd], 1)


def backward(
    dy: Tensor,
    before: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``(dx, dresidual, daffine)``: dx is None without dropout (it is dresidual).

    ``before`` is the sum or, where ``bias`` is given, the output.
    ``daffine`` is ``[2, width]``, of weight and bias, in the dtype of moments; None if not needed.
    """
    mean, rstd = moments.split(1, 1)
    wide, normal = dy.to(moments.dtype), before.to(moments.dtype)
    normal = (normal - mean) * rstd if bias is None else (normal - bias) / weight
    g = wide * weight
    dz = rstd * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))
    dx = None if seed is None else dropped(dz, seed, threshold).to(dy.dtype)
    daffine = torch.stack([(wide * normal).sum(0), wide.sum(0)]) if affine_needed else None
    return dx, dz.to(dy.dtype), daffine


def _sum(x: Tensor, residual: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    if seed is None or threshold == DRAWS:
        return residual + x
    return residual + dropped(x, seed, threshold)
