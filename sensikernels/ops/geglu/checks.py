"""Checks of the arguments of ``geglu`` and its operators."""

from __future__ import annotations

from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.checks import check_tensor, described
from sensikernels.ops.common.rowwise import resolve


def check(x: Tensor, bias: Tensor | None) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] % 2:
        raise expected("x", "floating [..., 2 n]", described(x))
    if bias is not None:
        check_tensor(bias, "bias", x.shape[-1:], None, x.device)


def checked(x: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None, str]:
    """The operator's arguments, with the backend that serves them."""
    check(x, bias)
    return x, bias, resolve(x, backend)


def checked_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None, bool, str]:
    """The arguments of the backward operator; ``dy`` is like the result."""
    check(x, bias)
    check_tensor(dy, "dy", (*x.shape[:-1], x.shape[-1] // 2), x.dtype, x.device)
    return dy, x, bias, bias_needed, resolve(x, backend)
