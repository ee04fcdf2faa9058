"""The definition: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import expected


def check(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise UsageError for a label that is neither a class nor ``ignore_index``; waits."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if wrong.any():
        refuse(labels, int(wrong.nonzero()[0]), classes, ignore_index)


def refuse(labels: Tensor, row: int, classes: int, ignore_index: int) -> None:
    """Raise the UsageError for the label of ``row``."""
    wanted = f"a class from 0 to {classes - 1} or {ignore_index}"
    raise expected("labels", wanted, f"{int(labels[row])} in row {row}")


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss [], stats [rows, 2], scale [])``, float32 or wider.

    ``stats``: the largest logit and ln Σ e^(logit - it), both 0 where ignored; ``scale``: one over
    the number of labelled rows. A label outside the classes gives NaN.
    """
    counted = labels != ignore_index
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = wide.where(counted[:, None], 0.0)
    inside = (labels >= 0) & (labels < logits.shape[1])
    top = wide.detach().amax(1)
    rest = (wide - top[:, None]).exp().sum(1).log()
    own = wide.gather(1, labels.where(inside, 0)[:, None])[:, 0]
    losses = ((top - own) + rest).where(inside, torch.nan).where(counted, 0.0)
    scale = counted.sum().to(wide.dtype).reciprocal()
    stats = torch.stack([top, rest.detach()], 1).where(counted[:, None], 0.0)
    return losses.sum() * scale, stats, scale.detach()


def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    """``dlogits``: (softmax - one at the label) · dloss · scale, 0 where ignored."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    share = ((logits.to(stats.dtype) - stats[:, :1]) - stats[:, 1:]).exp()
    gradient = (share - (classes == labels[:, None]).to(stats.dtype)) * (dloss * scale)
    inside = (labels >= 0) & (labels < logits.shape[1])
    gradient = gradient.where(inside[:, None], torch.nan)
    return gradient.where((labels != ignore_index)[:, None], 0.0).to(logits.dtype)
