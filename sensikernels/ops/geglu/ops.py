"""The operators ``sensikernels::geglu`` and its backward; the backend is an argument."""

from __future__ import annotations

from torch import Tensor

from sensikernels.ops.common.register import register
from sensikernels.ops.common.rowwise import kernels, rows
from sensikernels.ops.geglu.checks import checked, checked_backward


def forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The result by the kernels of ``backend``, of checked arguments."""
    y: Tensor = kernels("geglu", backend).geglu(rows(x), _dense(bias))
    return y.view(_half(x))


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """``(dx, dbias)``; dbias is empty unless it is needed."""
    run = kernels("geglu", backend).geglu_backward
    dx, dbias = run(rows(dy), rows(x), _dense(bias), bias_needed)
    return dx.view(x.shape), dbias


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _half(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2)


def _empty(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(_half(x))


def _empty_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool, _: str
) -> tuple[Tensor, Tensor]:
    summed = x.new_empty(0) if bias is None or not bias_needed else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), summed


register("geglu(Tensor x, Tensor? bias, str backend) -> Tensor", checked, forward, _empty)
register(
    "geglu_backward(Tensor dy, Tensor x, Tensor? bias, bool bias_needed, str backend)"
    " -> (Tensor, Tensor)",
    checked_backward,
    backward,
    _empty_backward,
)
