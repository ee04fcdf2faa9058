"""The operators ``sensikernels::cross_entropy`` and its backward; the backend is an argument."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sensikernels.ops.cross_entropy import native, reference

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
    dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, scale: Tensor,
    ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    dlogits: Tensor = kernels(backend).cross_entropy_backward(
        dloss, logits.contiguous(), labels.contiguous(), stats, scale, ignore_index
    )
    return dlogits


for _device in ("CPU", "CUDA"):
    _LIB.impl("cross_entropy", forward, _device)
    _LIB.impl("cross_entropy_backward", backward, _device)


@torch.library.register_fake("sensikernels::cross_entropy")
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scalars = [logits.new_empty((), dtype=dtype) for _ in range(2)]
    return scalars[0], logits.new_empty((logits.shape[0], 2), dtype=dtype), scalars[1]


@torch.library.register_fake("sensikernels::cross_entropy_backward")
def _(
    dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, scale: Tensor,
    ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)
