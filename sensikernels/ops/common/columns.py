"""Gather and scatter of feature columns, which a compact layer of full width pays for.

Torch moves single bf16 columns an element at a time (1.8-2.4 ms for 1024 x 1536, most of the GEMM
they feed); the compiled extension moves them at memory speed.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.checks import expected, require
from sensikernels._core.compile import constant_when_traced
from sensikernels._core.values import require_within
from sensikernels.ops.common.checks import described
from sensikernels.ops.common.register import register


@cache
def launcher(name: str) -> Any:
    """A launcher of the compiled extension, without the object that wraps it for tracers."""
    return getattr(extension.ops(), name).default._op


def unwatched(x: Tensor) -> bool:
    """True if nothing traces, fakes or counts operators: a launcher may be called past its own."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
    )


def serves(x: Tensor) -> bool:
    """True if launchers of the compiled extension take this tensor, and nothing else watches."""
    return x.is_cpu and x.dtype in _NATIVE_DTYPES and unwatched(x) and extension.available()


def fused_activation(dy: Tensor) -> bool:
    """True on a GPU: gelu's derivative and the bias gradient are taken in one pass."""
    return dy.is_cuda and dy.dtype in _NATIVE_DTYPES and _has_triton()


@constant_when_traced
@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


_PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checked_gather(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` is a matrix and ``index`` int32 [n] of its columns, ascending, beside it."""
    _check(x, index)
    require_within(index, "index", x.shape[1], ascending=True)
    return x, index


def _checked_scatter(
    x: Tensor, index: Tensor, width: int, fill: Tensor | None
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """``x`` has a column for each entry of ``index``, ascending in ``[0, width)``."""
    _check(x, index)
    require(width >= 0, "width", "a number of columns", width)
    if x.shape[1] != index.shape[0]:
        raise expected("x", f"[T, {index.shape[0]}]", list(x.shape))
    if fill is not None and (
        fill.shape != (width,) or fill.dtype != x.dtype or fill.device != x.device
    ):
        raise expected("fill", f"{x.dtype} [{width}] on {x.device}", described(fill))
    require_within(index, "index", width, ascending=True)
    return x, index, width, fill


def _check(x: Tensor, index: Tensor) -> None:
    if x.dim() != 2:
        raise expected("x", "a matrix", list(x.shape))
    if index.dtype != torch.int32 or index.dim() != 1 or index.device != x.device:
        raise expected("index", f"int32 [n] on {x.device}", described(index))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    if x.is_cpu and x.dtype in _NATIVE_DTYPES and extension.available():
        return launcher("gather_columns")(x.contiguous(), index.contiguous())
    return x.index_select(1, index)


def _scatter(x: Tensor, index: Tensor, width: int, fill: Tensor | None) -> Tensor:
    if x.is_cpu and x.dtype in _NATIVE_DTYPES and extension.available():
        fill = None if fill is None else fill.contiguous()
        return launcher("scatter_columns")(x.contiguous(), index.contiguous(), width, fill)
    full = x.new_zeros((x.shape[0], width)) if fill is None else fill.repeat(x.shape[0], 1)
    return full.index_copy_(1, index.long(), x)


def _empty_gather(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[0]))


def _empty_scatter(x: Tensor, index: Tensor, width: int, fill: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], width))


register(
    "gather_columns(Tensor x, Tensor index) -> Tensor", _checked_gather, _gather, _empty_gather
)
register(
    "scatter_columns(Tensor x, Tensor index, int width, Tensor? fill) -> Tensor",
    _checked_scatter,
    _scatter,
    _empty_scatter,
)


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
        fill = fill if fill is None or fill.is_contiguous() else fill.contiguous()
        return launcher("scatter_columns")(x, index, width, fill)
    return torch.ops.sensikernels.scatter_columns(x, index, width, fill)


def scatter_biased(x: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """``[T, width]`` of ``bias [width]``, ``x`` on top at columns ``index``; if ``serves(x)``."""
    return launcher("scatter_biased")(x.contiguous(), index, bias.contiguous())
