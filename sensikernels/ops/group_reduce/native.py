"""Launchers of the compiled kernels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sensikernels._core import extension


@cache
def refusal(device: str) -> str | None:
    """Why the extension cannot serve tensors on ``device``; None if it can."""
    if not extension.available():
        return extension.why_not()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    name = "sensikernels_native::group_reduce"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if key is None or not hasattr(extension.ops(), "group_reduce") or not has(name, key):
        return f"the extension was built without a kernel for {device}"
    return None


def group_reduce(
    descriptors: Tensor,
    chunks: Tensor,
    starts: Tensor,
    order: Tensor,
    members: Tensor,
    statistics: int,
    partials: Tensor,
    out: Tensor,
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
) -> None:
    """Two launches: partial sums of the chunks, then groups, ``running`` and ``ema``."""
    extension.ops().group_reduce(
        descriptors, chunks, starts, order, members, statistics, partials, out, running, ema, decay
    )
