"""The ops behind ``select_elements`` and ``select_kept``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import require
from sensikernels.ops.select_kept import native, reference
from sensikernels.ops.select_kept.checks import DTYPES, check_elements, check_order, check_units

_library = torch.library.Library("sensikernels", "FRAGMENT")
_library.define(
    "select_elements(Tensor[] tensors, Tensor[] grads, int[] offsets, int bytes, int[] k, "
    'int score, str backend="native") -> (Tensor, Tensor, Tensor)'
)
_library.define(
    "select_units(Tensor scores, Tensor? costs, Tensor? segments, Tensor? kinds, Tensor limits, "
    "int mode, int[] minimum, int[] multiple, bool prefix, int n_segments) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "fill_in_order(Tensor cost, Tensor segment, Tensor free, Tensor left, bool prefix, "
    "int segments) -> Tensor"
)


def _select_elements(
    tensors: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    size: int,
    k: list[int],
    score: int,
    backend: str = "native",
) -> tuple[Tensor, Tensor, Tensor]:
    check_elements(tensors, grads, offsets, size, k, score, backend)
    dtypes = {t.dtype for t in (*tensors, *grads)}
    refusal = native_refusal if backend == "native" else triton_refusal
    refused = refusal(tensors[0].device.type, dtypes)
    require(refused is None, "backend", "one that serves these tensors", refused)
    values = [t.contiguous() for t in tensors]
    # Without gradients the list repeats the tensors, and so do their copies.
    triples = zip(tensors, values, grads, strict=True)
    pairs = [v if g is t else g.contiguous() for t, v, g in triples]
    arena, threshold, counts = _arena(tensors, size, k)
    kernels: Any = native
    if backend == "triton":
        from sensikernels.ops.select_kept import triton as kernels
    kernels.select_elements(values, pairs, offsets, k, score, arena, threshold, counts)
    return arena, threshold, counts


def _arena(tensors: list[Tensor], size: int, k: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    device = tensors[0].device
    return (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(len(k), dtype=torch.float32, device=device),
        torch.empty(len(tensors), dtype=torch.int64, device=device),
    )


def _fake(
    tensors: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    size: int,
    k: list[int],
    score: int,
    backend: str = "native",
) -> tuple[Tensor, Tensor, Tensor]:
    check_elements(tensors, grads, offsets, size, k, score, backend)
    return _arena(tensors, size, k)


_library.impl("select_elements", _select_elements, "CPU")
_library.impl("select_elements", _select_elements, "CUDA")
torch.library.register_fake("sensikernels::select_elements", _fake, lib=_library)


def launch_units(
    scores: Tensor,
    costs: Tensor | None,
    segments: Tensor | None,
    kinds: Tensor | None,
    limits: Tensor,
    mode: int,
    minimum: list[int],
    multiple: list[int],
    prefix: bool,
    n_segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked arguments to the compiled kernel: bits, indices, counts, cost of the minimum."""
    bits, indices, counts, least = _unit_buffers(scores, n_segments)
    wide = [None if t is None else t.long().contiguous() for t in (segments, kinds)]
    least[0] = native.select_units(
        scores.double().contiguous(),
        None if costs is None else costs.double().contiguous(),
        *wide,
        limits.contiguous(),
        mode,
        minimum,
        multiple,
        prefix,
        bits,
        indices,
        counts,
    )
    return bits, indices, counts, least


def _unit_buffers(scores: Tensor, n_segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape, dtype=torch.bool),
        scores.new_empty(scores.shape, dtype=torch.int32),
        scores.new_empty(n_segments, dtype=torch.int32),
        scores.new_empty(1, dtype=torch.float64),
    )


def _check_units(scores: Tensor, *rest: Any) -> None:
    *call, _prefix, n_segments = rest
    call.append(n_segments)
    check_units(scores, *call)


def _select_units(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_units(scores, *rest)
    return launch_units(scores, *rest)


_library.impl("select_units", _select_units, "CPU")


def _fake_units(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_units(scores, *rest)
    return _unit_buffers(scores, rest[-1])


torch.library.register_fake("sensikernels::select_units", _fake_units, lib=_library)


def _fill(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    check_order(cost, segment, free, left, segments)
    return reference.fill_in_order(cost, segment, free, left, prefix, segments)


def _fill_on_device(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    check_order(cost, segment, free, left, segments)
    if native.refusal("cuda", "fill_in_order") is None:
        return native.fill_in_order(cost, segment, free, left, prefix, segments)
    from sensikernels.ops.select_kept import triton

    return triton.fill_in_order(cost, segment, free, left, prefix, segments)


_library.impl("fill_in_order", _fill, "CPU")
_library.impl("fill_in_order", _fill_on_device, "CUDA")


def _fake_fill(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    check_order(cost, segment, free, left, segments)
    return cost.new_empty(cost.shape, dtype=torch.bool)


torch.library.register_fake("sensikernels::fill_in_order", _fake_fill, lib=_library)


def native_refusal(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the compiled kernels cannot select elements of these tensors; None if they can."""
    other = [d for d in dtypes if d not in DTYPES]
    return f"{other[0]} is served by the reference only" if other else native.refusal(device)


def triton_refusal(device: str, dtypes: set[torch.dtype]) -> str | None:
    """Why Triton cannot select elements of these tensors; None if it can."""
    other = [d for d in dtypes if d not in DTYPES]
    if other:
        return f"{other[0]} is served by the reference only"
    if device != "cuda" and not environment.interpreting():
        return f"Triton runs on CUDA tensors, not on {device}"
    return None


def launch(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
    size: int,
    wanted: Sequence[int],
    score: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arena, threshold and counts."""
    arena, threshold, counts = torch.ops.sensikernels.select_elements(
        list(tensors), list(grads), list(offsets), size, list(wanted), score, backend
    )
    return arena, threshold, counts
