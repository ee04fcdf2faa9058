"""The operators ``sensikernels::dropout_add_norm`` and its backward; the backend is an argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sensikernels.ops.common.drops import Drop
from sensikernels.ops.common.norms import wide
from sensikernels.ops.common.register import register
from sensikernels.ops.common.rowwise import kernels, rows
from sensikernels.ops.dropout_add_norm.checks import checked, checked_backward
from sensikernels.ops.dropout_add_norm.reference import Saved

Results = tuple[Tensor, Tensor, Tensor]


def launch_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(y, sum, moments)`` of checked arguments: the sum is None unless ``save``."""
    seed, threshold, eps, save, backend = rest
    run = kernels("dropout_add_norm", backend).forward
    norm = weight.contiguous(), bias.contiguous()
    y, total, moments = run(rows(x), rows(residual), *norm, Drop(seed, threshold), eps, save)
    return y if x.ndim == 2 else y.view(x.shape), total, moments


def launch_backward(
    dy: Tensor, before: Tensor, moments: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``(dx, dresidual, daffine)``: no dx without a seed (it is dresidual), daffine if needed."""
    seed, threshold, affine_needed, backend = rest
    run = kernels("dropout_add_norm", backend).backward
    shift = None if bias is None else bias.contiguous()
    saved = Saved(rows(before), moments.contiguous(), weight.contiguous(), shift)
    dx, dresidual, daffine = run(rows(dy), saved, Drop(seed, threshold), affine_needed)
    if dy.ndim != 2:
        dx, dresidual = None if dx is None else dx.view(dy.shape), dresidual.view(dy.shape)
    return dx, dresidual, daffine


def _forward(x: Tensor, *rest: Any) -> Results:
    y, total, moments = launch_forward(x, *rest)
    return y, x.new_empty(0) if total is None else total, moments


def _backward(dy: Tensor, before: Tensor, moments: Tensor, *rest: Any) -> Results:
    dx, dresidual, daffine = launch_backward(dy, before, moments, *rest)
    sums = moments.new_empty(0) if daffine is None else daffine
    return dy.new_empty(0) if dx is None else dx, dresidual, sums


def _empty(x: Tensor, *rest: Any) -> Results:
    *_, save, _ = rest
    matrix = (x.shape[:-1].numel(), x.shape[-1])
    moments = x.new_empty((matrix[0], 2), dtype=wide(x.dtype))
    return x.new_empty(x.shape), x.new_empty(matrix if save else 0), moments


def _empty_backward(dy: Tensor, before: Tensor, moments: Tensor, *rest: Any) -> Results:
    *_, seed, _, affine_needed, _ = rest
    daffine = moments.new_empty((2, dy.shape[-1]) if affine_needed else 0)
    return dy.new_empty(0 if seed is None else dy.shape), dy.new_empty(dy.shape), daffine


register(
    "dropout_add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed,"
    " int threshold, float eps, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    checked,
    _forward,
    _empty,
)
register(
    "dropout_add_norm_backward(Tensor dy, Tensor before, Tensor moments, Tensor weight,"
    " Tensor? bias, Tensor? seed, int threshold, bool affine_needed, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    checked_backward,
    _backward,
    _empty_backward,
)
