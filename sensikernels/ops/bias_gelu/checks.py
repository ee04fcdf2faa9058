"""What ``bias_gelu`` and its operators demand of their arguments."""

from __future__ import annotations

from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.common.checks import check_tensor, described


def check(x: Tensor, bias: Tensor | None) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if not x.is_floating_point() or x.dim() == 0:
        require(False, "x", "floating [..., width]", described(x))
    if bias is not None:
        check_tensor(bias, "bias", x.shape[-1:], None, x.device)


def check_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """As ``check``, with a gradient like x."""
    check(x, bias)
    check_tensor(dy, "dy", x.shape, x.dtype, x.device)
