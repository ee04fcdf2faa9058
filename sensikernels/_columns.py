"""Gather and scatter of feature columns: what a packed layer of full width pays beside its GEMM.

Torch moves single bf16 columns an element at a time (1.8-2.4 ms for 1024 x 1536, most of the GEMM
they feed); the compiled extension moves them at memory speed.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sensikernels import _native
from sensikernels._compile import constant_when_traced

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define("gather_columns(Tensor x, Tensor index) -> Tensor")
_LIB.define("scatter_columns(Tensor x, Tensor index, int width, Tensor? fill) -> Tensor")


@cache
def launcher(name: str) -> Any:
    """A launcher of the compiled extension, without the object that wraps it for tracers."""
    return getattr(_native.ops(), name).default._op


def unwatched(x: Tensor) -> bool:
    """True if nothing traces, fakes or counts operators: a launcher may be called past its own."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
    )


def serves(x: Tensor) -> bool:
    """Whether launchers of the compiled extension take this tensor, nothing else watching."""
    return x.is_cpu and x.dtype in _NATIVE_DTYPES and unwatched(x) and _native.available()


def fused_activation(dy: Tensor) -> bool:
    """Whether gelu's derivative and the bias gradient are taken in one pass: on a GPU."""
    return dy.is_cuda and dy.dtype in _NATIVE_DTYPES and _has_triton()


@constant_when_traced
@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


_PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _gather_torch(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(1, index)


def _scatter_torch(x: Tensor, index: Tensor, width: int, fill: Tensor | None) -> Tensor:
    full = x.new_zeros((x.shape[0], width)) if fill is None else fill.repeat(x.shape[0], 1)
    return full.index_copy_(1, index.long(), x)


def _gather_cpu(x: Tensor, index: Tensor) -> Tensor:
    if x.dtype in _NATIVE_DTYPES and _native.available():
        return launcher("gather_columns")(x.contiguous(), index)
    return _gather_torch(x, index)


def _scatter_cpu(x: Tensor, index: Tensor, width: int, fill: Tensor | None) -> Tensor:
    if x.dtype in _NATIVE_DTYPES and _native.available():
        return launcher("scatter_columns")(x.contiguous(), index, width, fill)
    return _scatter_torch(x, index, width, fill)


_LIB.impl("gather_columns", _gather_cpu, "CPU")
_LIB.impl("scatter_columns", _scatter_cpu, "CPU")
_LIB.impl("gather_columns", _gather_torch, "CUDA")
_LIB.impl("scatter_columns", _scatter_torch, "CUDA")


@torch.library.register_fake("sensikernels::gather_columns")
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[0]))


@torch.library.register_fake("sensikernels::scatter_columns")
def _(x: Tensor, index: Tensor, width: int, fill: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], width))


def matrix(x: Tensor) -> Tensor:
    """``[..., features]`` as ``[T, features]``."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def gather(x: Tensor, index: Tensor | None) -> Tensor:
    """``x[:, index]`` of a matrix; ``x`` itself without an index. ``index`` is ascending int32."""
    if index is None:
        return x
    if serves(x):
        return launcher("gather_columns")(x if x.is_contiguous() else x.contiguous(), index)
    return torch.ops.sensikernels.gather_columns(x, index)


def scatter(x: Tensor, index: Tensor | None, width: int, fill: Tensor | None = None) -> Tensor:
    """``[T, width]`` with ``x`` at columns ``index``, ``fill [width]`` (zero) in the others."""
    if index is None:
        return x
    if serves(x):
        x = x if x.is_contiguous() else x.contiguous()
        return launcher("scatter_columns")(x, index, width, fill)
    return torch.ops.sensikernels.scatter_columns(x, index, width, fill)


def scatter_biased(x: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """``[T, width]`` of ``bias [width]``, ``x`` on top at columns ``index``; if ``serves(x)``."""
    return launcher("scatter_biased")(x.contiguous(), index, bias.contiguous())
