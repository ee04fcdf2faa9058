"""What the cross-entropy and its operators demand of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels._core.values import readable
from sensikernels.ops.common.checks import check_tensor, described
from sensikernels.ops.cross_entropy import reference


def check(logits: Tensor, labels: Tensor) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[1] == 0:
        require(False, "logits", "floating [rows, classes >= 1]", described(logits))
    fits = labels.shape == logits.shape[:1] and labels.dtype in (torch.int64, torch.int32)
    if not fits or labels.device != logits.device:
        want = f"int64 [{logits.shape[0]}] on {logits.device}"
        require(False, "labels", want, described(labels))


def check_labels(labels: Tensor, classes: int, ignore_index: int, backend: str) -> None:
    """Raise for a label that is no class, if it can be read; compiled kernels look themselves."""
    if backend != "native" and readable(labels):
        reference.check(labels, classes, ignore_index)


def check_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, scale: Tensor
) -> None:
    """As ``check``, with what the forward gave."""
    check(logits, labels)
    wide = torch.promote_types(logits.dtype, torch.float32)
    check_tensor(dloss, "dloss", (), None, logits.device)
    check_tensor(stats, "stats", (logits.shape[0], 2), wide, logits.device)
    check_tensor(scale, "scale", (), wide, logits.device)
