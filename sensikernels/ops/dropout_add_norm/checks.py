"""What ``dropout_add_norm`` and its operators demand of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.common.checks import check_drops, check_tensor, described


def check(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, name: str = "x"
) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree; ``name`` is x's."""
    if not x.is_floating_point() or x.dim() == 0:
        require(False, name, "floating [..., hidden]", described(x))
    same = residual.shape == x.shape and residual.dtype == x.dtype
    if not same or residual.device != x.device:
        require(False, "residual", described(x), described(residual))
    check_tensor(weight, "weight", x.shape[-1:], None, x.device)
    if bias is not None:
        check_tensor(bias, "bias", x.shape[-1:], None, x.device)
    if not eps >= 0.0:
        require(False, "eps", "a number >= 0", eps)


def check_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> None:
    """As ``check``, with the draws of the operator."""
    check(x, residual, weight, bias, eps)
    check_drops(seed, threshold, x.device)


def check_backward(
    dy: Tensor,
    before: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
) -> None:
    """``before``: the sum, a matrix, or the output, like ``dy``; ``moments`` are the forward's."""
    check(dy, dy, weight, bias, 0.0, "dy")
    matrix = (dy.shape[:-1].numel(), dy.shape[-1])
    shape = before.shape if before.shape == dy.shape else matrix
    check_tensor(before, "before", shape, dy.dtype, dy.device)
    wide = torch.promote_types(dy.dtype, torch.float32)
    check_tensor(moments, "moments", (matrix[0], 2), wide, dy.device)
    check_drops(seed, threshold, dy.device)
