"""Launchers of the compiled kernels."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sensikernels._core import extension


@cache
def refusal(device: str, op: str = "select_elements") -> str | None:
    """Why the extension cannot run ``op`` on ``device``; None if it can."""
    if not extension.available():
        return extension.why_not()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = f"sensikernels_native::{op}"
    if key is None or not hasattr(extension.ops(), op) or not has(name, key):
        return f"the extension was built without a kernel of {op} for {device}"
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
    extension.ops().select_elements(tensors, grads, offsets, k, score, arena, threshold, counts)


def select_units(*arguments: Any) -> float:
    """Fills bits, indices and counts; returns the cost of the minimum."""
    return cast(float, extension.ops().select_units(*arguments))


def fill_in_order(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    """On a device: what is taken when chunks are met in this order; one launch."""
    arguments = (cost, segment, free, left.contiguous(), prefix, segments)
    return cast(Tensor, extension.ops().fill_in_order(*arguments))


def select_chain(value: Tensor, own: Tensor, passed: Tensor, bins: int) -> Tensor:
    """See ``chain.chain_reference``."""
    return cast(Tensor, extension.ops().select_chain(value, own, passed, bins))
