"""The operators ``sensikernels::bias_gelu`` and its backward; the backend is an argument."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sensikernels.ops.bias_gelu import checks, native, reference
from sensikernels.ops.common.rowwise import resolve, rows

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define("bias_gelu(Tensor x, Tensor? bias, str backend) -> Tensor")
_LIB.define(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool bias_needed, str backend)"
    " -> (Tensor, Tensor)"
)


def kernels(backend: str) -> ModuleType:
    """The module that holds the launchers of ``backend``."""
    if backend == "triton":
        from sensikernels.ops.bias_gelu import triton

        return triton
    return native if backend == "native" else reference


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    y: Tensor = kernels(backend).bias_gelu(rows(x), _dense(bias))
    return y.view(x.shape)


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dx, dbias = kernels(backend).bias_gelu_backward(rows(dy), rows(x), _dense(bias), bias_needed)
    return dx.view(x.shape), dbias


def _forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    checks.check(x, bias)
    return forward(x, bias, resolve(x, backend))


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    checks.check_backward(dy, x, bias)
    return backward(dy, x, bias, bias_needed, resolve(x, backend))


for _device in ("CPU", "CUDA"):
    _LIB.impl("bias_gelu", _forward, _device)
    _LIB.impl("bias_gelu_backward", _backward, _device)


@torch.library.register_fake("sensikernels::bias_gelu")
def _(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    checks.check(x, bias)
    resolve(x, backend)
    return x.new_empty(x.shape)


@torch.library.register_fake("sensikernels::bias_gelu_backward")
def _(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    checks.check_backward(dy, x, bias)
    resolve(x, backend)
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_needed else x.new_empty(0)
    return x.new_empty(x.shape), dbias
