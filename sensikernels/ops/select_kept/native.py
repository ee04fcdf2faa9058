"""Launchers of the compiled kernels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sensikernels import _native


@cache
def refusal(device: str) -> str | None:
    """Why the extension cannot serve tensors on ``device``; None if it can."""
    if not _native.available():
        return _native.why_not()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    name = "sensikernels_native::select_elements"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if key is None or not hasattr(_native.ops(), "select_elements") or not has(name, key):
        return f"the extension was built without a kernel for {device}"
    return None


def select_elements(
    tensors: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    k: list[int],
    score: int,
    arena: Tensor,
    threshold: Tensor,
    counts: Tensor,
) -> None:
    """Exact counts, ties to the lowest entry; one count for all tensors or one each."""
    _native.ops().select_elements(tensors, grads, offsets, k, score, arena, threshold, counts)
