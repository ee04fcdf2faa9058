"""Launchers of the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher
from sensikernels.ops.cross_entropy.reference import refuse


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, stats, scale)`` of contiguous float32 or bfloat16 ``logits`` and int64 ``labels``.

    Raises UsageError for a label that is neither a class nor ``ignore_index``.
    """
    rows, classes = logits.shape
    stats = logits.new_empty((rows, 2), dtype=torch.float32)
    loss, scale = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    wrong = launcher("cross_entropy")(logits, labels, ignore_index, stats, loss, scale)
    if wrong >= 0:
        refuse(labels, wrong, classes, ignore_index)
    return loss, stats, scale


def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    """``dlogits``, from the arguments and results of ``cross_entropy``."""
    dlogits = logits.new_empty(logits.shape)
    launcher("cross_entropy_backward")(
        dloss.float(), logits, labels, stats, scale, ignore_index, dlogits
    )
    return dlogits
