"""The op behind ``select_elements``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels.ops.select_kept import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("sensikernels", "FRAGMENT")
_library.define(
    "select_elements(Tensor[] tensors, Tensor[] grads, int[] offsets, int bytes, int[] k, "
    "int score) -> (Tensor, Tensor, Tensor)"
)


def _select_elements(
    tensors: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    size: int,
    k: list[int],
    score: int,
) -> tuple[Tensor, Tensor, Tensor]:
    values = [t.contiguous() for t in tensors]
    # Without gradients the list repeats the tensors, and so do their copies.
    triples = zip(tensors, values, grads, strict=True)
    pairs = [v if g is t else g.contiguous() for t, v, g in triples]
    arena, threshold, counts = _fake(tensors, grads, offsets, size, k, score)
    native.select_elements(values, pairs, offsets, k, score, arena, threshold, counts)
    return arena, threshold, counts


def _fake(
    tensors: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    size: int,
    k: list[int],
    score: int,
) -> tuple[Tensor, Tensor, Tensor]:
    device = tensors[0].device if tensors else torch.device("cpu")
    return (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(len(k), dtype=torch.float32, device=device),
        torch.empty(len(tensors), dtype=torch.int64, device=device),
    )


_library.impl("select_elements", _select_elements, "CPU")
_library.impl("select_elements", _select_elements, "CUDA")
torch.library.register_fake("sensikernels::select_elements", _fake, lib=_library)


def native_refusal(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the compiled kernels cannot serve these tensors; None if they can."""
    other = [d for d in dtypes if d not in DTYPES]
    return f"{other[0]} is served by the reference only" if other else native.refusal(device)


def launch(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
    size: int,
    wanted: Sequence[int],
    score: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arena, threshold and counts."""
    arena, threshold, counts = torch.ops.sensikernels.select_elements(
        list(tensors), list(grads), list(offsets), size, list(wanted), score
    )
    return arena, threshold, counts
