"""The operators ``sensikernels::dropout_add_norm`` and its backward; the backend is an argument."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.common.columns import matrix
from sensikernels.ops.common.rowwise import resolve
from sensikernels.ops.dropout_add_norm import native, reference
from sensikernels.ops.dropout_add_norm.checks import check_backward, check_forward

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "dropout_add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed,"
    " int threshold, float eps, bool save, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "dropout_add_norm_backward(Tensor dy, Tensor before, Tensor moments, Tensor weight,"
    " Tensor? bias, Tensor? seed, int threshold, bool affine_needed, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def kernels(backend: str) -> ModuleType:
    """The module that holds the launchers of ``backend``."""
    if backend == "triton":
        from sensikernels.ops.dropout_add_norm import triton

        return triton
    return native if backend == "native" else reference


def launch_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(y, sum, moments)``: the sum is None unless ``save``."""
    y, total, moments = kernels(backend).forward(
        _rows(x),
        _rows(residual),
        weight.contiguous(),
        bias.contiguous(),
        seed,
        threshold,
        eps,
        save,
    )
    return y if x.ndim == 2 else y.view(x.shape), total, moments


def launch_backward(
    dy: Tensor,
    before: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``(dx, dresidual, daffine)``: no dx without a seed (it is dresidual), daffine if needed."""
    shift = None if bias is None else bias.contiguous()
    dx, dresidual, daffine = kernels(backend).backward(
        _rows(dy),
        _rows(before),
        moments.contiguous(),
        weight.contiguous(),
        shift,
        seed,
        threshold,
        affine_needed,
    )
    if dy.ndim != 2:
        dx, dresidual = None if dx is None else dx.view(dy.shape), dresidual.view(dy.shape)
    return dx, dresidual, daffine


def _rows(x: Tensor) -> Tensor:
    return matrix(x.contiguous())


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *call, save, backend = rest
    check_forward(x, *call)
    call += save, resolve(x, backend)
    y, total, moments = launch_forward(x, *call)
    return y, x.new_empty(0) if total is None else total, moments


def _backward(dy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *call, affine_needed, backend = rest
    check_backward(dy, *call)
    call += affine_needed, resolve(dy, backend)
    dx, dresidual, daffine = launch_backward(dy, *call)
    none = rest[1].new_empty(0) if daffine is None else daffine
    return dy.new_empty(0) if dx is None else dx, dresidual, none


for _device in ("CPU", "CUDA"):
    _LIB.impl("dropout_add_norm", _forward, _device)
    _LIB.impl("dropout_add_norm_backward", _backward, _device)


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
    check_forward(x, residual, weight, bias, seed, threshold, eps)
    resolve(x, backend)
    matrix = (x.shape[:-1].numel(), x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(matrix if save else 0)
    return x.new_empty(x.shape), total, x.new_empty((matrix[0], 2), dtype=wide)


@torch.library.register_fake("sensikernels::dropout_add_norm_backward")
def _(
    dy: Tensor,
    before: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(dy, before, moments, weight, bias, seed, threshold)
    resolve(dy, backend)
    daffine = moments.new_empty((2, dy.shape[-1]) if affine_needed else 0)
    return dy.new_empty(0 if seed is None else dy.shape), dy.new_empty(dy.shape), daffine
