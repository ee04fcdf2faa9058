"""The op behind ``select_elements``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels import _settings
from sensikernels.ops.select_kept import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_refusal(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the compiled kernels cannot serve these tensors; None if they can."""
    other = [d for d in dtypes if d not in DTYPES]
    return f"{other[0]} is served by the reference only" if other else native.refusal(device)


def triton_refusal(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the Triton kernels cannot serve these tensors; None if they can."""
    other = [d for d in dtypes if d not in DTYPES]
    if other:
        return f"{other[0]} is served by the reference only"
    if device != "cuda" and not _settings.interpreting():
        return f"Triton runs on CUDA tensors, not on {device}"
    return None


def launch(
    backend: str,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
    end: int,
    wanted: Sequence[int],
    score: int,
    per_tensor: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arena, threshold and counts."""
    arena, threshold, counts = torch.ops.sensikernels.select_elements(
        list(tensors), list(grads), list(offsets), end, list(wanted), score, per_tensor, backend
    )
    return arena, threshold, counts
