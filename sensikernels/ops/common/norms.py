"""LayerNorm of a matrix in plain PyTorch, its backward, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.checks import check_tensor


def check_affine(
    weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """``weight`` and ``bias`` are floating ``[hidden]`` on ``device``."""
    check_tensor(weight, "weight", shape, None, device)
    if bias is not None:
        check_tensor(bias, "bias", shape, None, device)


def check_eps(eps: float) -> None:
    """``eps`` is not negative."""
    if not eps >= 0.0:
        raise expected("eps", "a number >= 0", eps)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are summed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def normalize(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(y, moments)`` of ``z [rows, hidden]``; ``moments [rows, 2]``: mean, 1 / deviation."""
    # Together, by Welford: the mean of a row of equal elements is that element.
    variance, mean = torch.var_mean(z, 1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return (z - mean) * rstd * weight + bias, torch.cat([mean, rstd], 1)


def normalize_backward(dy: Tensor, normal: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``z``; ``normal [rows, hidden]`` is ``(z - mean) · rstd``."""
    g = dy * weight
    return rstd * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))


def affine_gradient(dy: Tensor, normal: Tensor) -> Tensor:
    """``[2, hidden]``: the gradients of weight and bias."""
    return torch.stack([(dy * normal).sum(0), dy.sum(0)])
