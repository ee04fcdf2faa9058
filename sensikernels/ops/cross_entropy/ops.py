"""The operators ``sensikernels::cross_entropy`` and its backward; the backend is an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.common.register import register
from sensikernels.ops.common.rowwise import kernels
from sensikernels.ops.cross_entropy.checks import checked, checked_backward


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, stats, scale)`` by the kernels of ``backend``, of checked arguments."""
    run = kernels("cross_entropy", backend).cross_entropy
    loss, stats, scale = run(logits.contiguous(), labels.contiguous(), ignore_index)
    return loss, stats, scale


def backward(dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, *rest: Any) -> Tensor:
    """``dlogits``; ``rest``: scale, ignore_index, backend."""
    scale, ignore_index, backend = rest
    dense = logits.contiguous(), labels.contiguous(), stats.contiguous()
    run = kernels("cross_entropy", backend).cross_entropy_backward
    dlogits: Tensor = run(dloss, *dense, scale, ignore_index)
    return dlogits


def _empty(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss, scale = (logits.new_empty((), dtype=dtype) for _ in range(2))
    return loss, logits.new_empty((logits.shape[0], 2), dtype=dtype), scale


def _empty_backward(dloss: Tensor, logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape)


register(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    checked,
    forward,
    _empty,
)
register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor stats, Tensor scale,"
    " int ignore_index, str backend) -> Tensor",
    checked_backward,
    backward,
    _empty_backward,
)
