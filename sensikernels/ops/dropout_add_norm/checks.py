"""Checks of the arguments of ``dropout_add_norm`` and its operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.checks import check_drops, check_tensor, described
from sensikernels.ops.common.norms import check_affine, check_eps, wide
from sensikernels.ops.common.rowwise import resolve


def check(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, name: str = "x"
) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree; ``name`` is x's."""
    shape, device = x.shape, x.device
    if not x.is_floating_point() or not shape:
        raise expected(name, "floating [..., hidden]", described(x))
    same = residual.shape == shape and residual.dtype == x.dtype
    if not same or residual.device != device:
        raise expected("residual", described(x), described(residual))
    check_affine(weight, bias, shape[-1:], device)


def checked(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """The operator's arguments, with the backend that serves them."""
    seed, threshold, eps, save, backend = rest
    check(x, residual, weight, bias)
    check_eps(eps)
    check_drops(seed, threshold, x.device)
    return x, residual, weight, bias, seed, threshold, eps, save, resolve(x, backend)


def checked_backward(
    dy: Tensor, before: Tensor, moments: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """``before``: the sum, a matrix, or the output, like ``dy``; ``moments`` are the forward's."""
    seed, threshold, affine_needed, backend = rest
    check(dy, dy, weight, bias, "dy")
    matrix = (dy.shape[:-1].numel(), dy.shape[-1])
    shape = before.shape if before.shape == dy.shape else matrix
    check_tensor(before, "before", shape, dy.dtype, dy.device)
    check_tensor(moments, "moments", (matrix[0], 2), wide(dy.dtype), dy.device)
    check_drops(seed, threshold, dy.device)
    drop = seed, threshold
    return dy, before, moments, weight, bias, *drop, affine_needed, resolve(dy, backend)
