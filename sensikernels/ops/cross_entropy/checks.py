"""Checks of the arguments of ``cross_entropy`` and its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels._core.values import readable
from sensikernels.ops.common.checks import check_tensor, described
from sensikernels.ops.common.rowwise import resolve
from sensikernels.ops.cross_entropy import reference


def check(logits: Tensor, labels: Tensor) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[1] == 0:
        raise expected("logits", "floating [rows, classes >= 1]", described(logits))
    fits = labels.shape == logits.shape[:1] and labels.dtype in (torch.int64, torch.int32)
    if not fits or labels.device != logits.device:
        wanted = f"int64 [{logits.shape[0]}] on {logits.device}"
        raise expected("labels", wanted, described(labels))


def check_labels(labels: Tensor, classes: int, ignore_index: int, backend: str) -> None:
    """Raise for a label that is no class, if it can be read; compiled kernels look themselves."""
    if backend != "native" and readable(labels):
        reference.check(labels, classes, ignore_index)


def checked(
    logits: Tensor, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, int, str]:
    """The operator's arguments, with int64 labels and the backend that serves them."""
    check(logits, labels)
    chosen = resolve(logits, backend)
    check_labels(labels, logits.shape[1], ignore_index, chosen)
    return logits, labels.long(), ignore_index, chosen


def checked_backward(dloss: Tensor, logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The arguments of the backward operator: a gradient of the loss, and the forward's results."""
    stats, scale, *call = rest
    logits, labels, *call = checked(logits, labels, *call)
    wide = torch.promote_types(logits.dtype, torch.float32)
    check_tensor(dloss, "dloss", (), None, logits.device)
    check_tensor(stats, "stats", (logits.shape[0], 2), wide, logits.device)
    check_tensor(scale, "scale", (), wide, logits.device)
    return dloss, logits, labels, stats, scale, *call
