"""Checks of a masked linear's arguments, for its operators."""

from __future__ import annotations

from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.carried import Carried
from sensikernels.ops.common.checks import check_kernels, check_rank
from sensikernels.ops.common.linears import ACTIVATIONS, check_operands

__all__ = ["ACTIVATIONS", "check_forward"]


def check_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layout: Carried, activation: str, backend: str
) -> None:
    """Raise UsageError where operands of the operator disagree: nothing is cast, x is a matrix."""
    check_kernels(backend, x)
    check_rank(x, "x", 2)
    for name, t in (("values", values), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise expected(name, f"dtype {x.dtype} as x", t.dtype)
    check_operands(x, values, layout, bias, activation, layout.in_width, layout.out_width)
