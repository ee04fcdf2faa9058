"""The operators ``sensikernels::dropout_add_norm`` and its backward; the backend is an argument."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sensikernels.ops.common.choice import rows
from sensikernels.ops.dropout_add_norm import native, reference

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "dropout_add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed,"
    " int threshold, float eps, bool save, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "dropout_add_norm_backward(Tensor dy, Tensor total, Tensor moments, Tensor weight,"
    " Tensor? seed, int threshold, bool affine_needed, str backend) -> (Tensor, Tensor, Tensor)"
)


def kernels(backend: str) -> ModuleType:
    """The module that holds the launchers of ``backend``."""
    if backend == "triton":
        from sensikernels.ops.dropout_add_norm import triton

        return triton
    return native if backend == "native" else reference


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, moments = kernels(backend).forward(
        rows(x), rows(residual), weight.contiguous(), bias.contiguous(), seed, threshold, eps, save
    )
    return y.view(x.shape), total, moments


def backward(
    dy: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dresidual, daffine = kernels(backend).backward(
        rows(dy), total, moments, weight.contiguous(), seed, threshold, affine_needed
    )
    return dx.view(dx.shape if seed is None else dy.shape), dresidual.view(dy.shape), daffine


for _device in ("CPU", "CUDA"):
    _LIB.impl("dropout_add_norm", forward, _device)
    _LIB.impl("dropout_add_norm_backward", backward, _device)


@torch.library.register_fake("sensikernels::dropout_add_norm")
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = (x.shape[:-1].numel(), x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(matrix if save else 0)
    return x.new_empty(x.shape), total, x.new_empty((matrix[0], 2), dtype=wide)


@torch.library.register_fake("sensikernels::dropout_add_norm_backward")
def _(
    dy: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    daffine = moments.new_empty((2, dy.shape[-1]) if affine_needed else 0)
    return dy.new_empty(0 if seed is None else dy.shape), dy.new_empty(dy.shape), daffine
