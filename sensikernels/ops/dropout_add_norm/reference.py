"""The definition, differentiated by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.common import norms
from sensikernels.ops.common.drops import Drop


class Saved(NamedTuple):
    """The tensors that backward reads beside the gradient.

    ``before`` is the sum or, where ``bias`` is given, the output; ``moments`` are the forward's.
    """

    before: Tensor
    moments: Tensor
    weight: Tensor
    bias: Tensor | None


def dropout_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, drop: Drop, eps: float
) -> Tensor:
    """``LayerNorm(residual + dropout(x)) · weight + bias``, in float32 at least."""
    z = _sum(x, residual, drop)
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps).to(x.dtype)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, drop: Drop, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(y, sum, moments)`` of matrices: ``sum`` in x's dtype, None unless ``save``.

    ``moments`` is ``[rows, 2]``, mean and 1 / standard deviation, float32 (float64 for float64).
    """
    z = _sum(x, residual, drop)
    y, moments = norms.normalize(z, weight, bias, eps)
    return y.to(x.dtype), z.to(x.dtype) if save else None, moments


def backward(
    dy: Tensor, saved: Saved, drop: Drop, affine_needed: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``(dx, dresidual, daffine)``: dx is None without dropout (it is dresidual).

    ``daffine`` is ``[2, width]``, of weight and bias, in the dtype of moments; None if not needed.
    """
    before, moments, weight, bias = saved
    mean, rstd = moments.split(1, 1)
    wide, normal = dy.to(moments.dtype), before.to(moments.dtype)
    normal = (normal - mean) * rstd if bias is None else (normal - bias) / weight
    dz = norms.normalize_backward(wide, normal, rstd, weight)
    dx = None if drop.seed is None else drop.applied(dz).to(dy.dtype)
    return dx, dz.to(dy.dtype), norms.affine_gradient(wide, normal) if affine_needed else None


def _sum(x: Tensor, residual: Tensor, drop: Drop) -> Tensor:
    wide = norms.wide(x.dtype)
    return residual.to(wide) + drop.applied(x.to(wide))
