"""The operators ``sensikernels::cross_entropy`` and its backward; the backend is an argument."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sensikernels.ops.common.rowwise import resolve
from sensikernels.ops.cross_entropy import checks, native, reference

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor stats, Tensor scale,"
    " int ignore_index, str backend) -> Tensor"
)


def kernels(backend: str) -> ModuleType:
    """The module that holds the launchers of ``backend``."""
    if backend == "triton":
        from sensikernels.ops.cross_entropy import triton

        return triton
    return native if backend == "native" else reference


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, scale = kernels(backend).cross_entropy(
        logits.contiguous(), labels.contiguous(), ignore_index
    )
    return loss, stats, scale


def backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    scale: Tensor,
    ignore_index: int,
    backend: str,
) -> Tensor:
    dlogits: Tensor = kernels(backend).cross_entropy_backward(
        dloss, logits.contiguous(), labels.contiguous(), stats.contiguous(), scale, ignore_index
    )
    return dlogits


def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check(logits, labels)
    chosen = resolve(logits, backend)
    checks.check_labels(labels, logits.shape[1], ignore_index, chosen)
    return forward(logits, labels.long(), ignore_index, chosen)


def _backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    scale: Tensor,
    ignore_index: int,
    backend: str,
) -> Tensor:
    checks.check_backward(dloss, logits, labels, stats, scale)
    chosen = resolve(logits, backend)
    checks.check_labels(labels, logits.shape[1], ignore_index, chosen)
    return backward(dloss, logits, labels.long(), stats, scale, ignore_index, chosen)


for _device in ("CPU", "CUDA"):
    _LIB.impl("cross_entropy", _forward, _device)
    _LIB.impl("cross_entropy_backward", _backward, _device)


@torch.library.register_fake("sensikernels::cross_entropy")
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check(logits, labels)
    resolve(logits, backend)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scalars = [logits.new_empty((), dtype=dtype) for _ in range(2)]
    return scalars[0], logits.new_empty((logits.shape[0], 2), dtype=dtype), scalars[1]


@torch.library.register_fake("sensikernels::cross_entropy_backward")
def _(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    scale: Tensor,
    ignore_index: int,
    backend: str,
) -> Tensor:
    checks.check_backward(dloss, logits, labels, stats, scale)
    resolve(logits, backend)
    return logits.new_empty(logits.shape)
