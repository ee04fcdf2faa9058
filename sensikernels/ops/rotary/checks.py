"""Checks of the arguments of ``rotary`` and its operator."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.checks import check_tensor, described
from sensikernels.ops.common.rowwise import resolve


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if not x.is_floating_point() or x.dim() != 3 or x.shape[2] % 2:
        raise expected("x", "floating [tokens, heads, size], size even", described(x))
    shape = (x.shape[0], x.shape[2] // 2)
    for name, t in (("cos", cos), ("sin", sin)):
        check_tensor(t, name, shape, x.dtype if t.dtype == x.dtype else torch.float32, x.device)


def checked(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, bool, str]:
    """The operator's arguments, with the backend that serves them."""
    check(x, cos, sin)
    return x, cos, sin, inverse, resolve(x, backend)
