"""The operators behind ``select_elements`` and ``select_kept``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.common.lists import native_refusal, triton_refusal
from sensikernels.ops.select_kept import native, reference
from sensikernels.ops.select_kept.checks import Units, check_elements, check_order, check_units

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


class Elements(NamedTuple):
    """Arguments of ``select_elements``, in the order of its schema."""

    tensors: list[Tensor]
    grads: list[Tensor]
    offsets: list[int]
    bytes: int
    k: list[int]
    score: int
    backend: str = "native"

    def arena(self) -> tuple[Tensor, Tensor, Tensor]:
        """New results: bits, threshold and counts."""
        device = self.tensors[0].device
        return (
            torch.empty(self.bytes, dtype=torch.uint8, device=device),
            torch.empty(len(self.k), dtype=torch.float32, device=device),
            torch.empty(len(self.tensors), dtype=torch.int64, device=device),
        )


def _checked(*arguments: Any) -> Elements:
    call = Elements(*arguments)
    check_elements(*call)
    return call


def _select_elements(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _checked(*arguments)
    tensors, grads = call.tensors, call.grads
    device, compiled = tensors[0].device.type, call.backend == "native"
    refused = native_refusal("select_elements", device) if compiled else triton_refusal(device)
    require(refused is None, "backend", "one that serves these tensors", refused)
    values = [t.contiguous() for t in tensors]
    # Without gradients the list repeats the tensors, and so do their copies.
    triples = zip(tensors, values, grads, strict=True)
    pairs = [v if g is t else g.contiguous() for t, v, g in triples]
    results = call.arena()
    kernels: Any = native
    if call.backend == "triton":
        from sensikernels.ops.select_kept import triton as kernels
    kernels.select_elements(values, pairs, call.offsets, call.k, call.score, *results)
    return results


def launch_units(call: Units) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked arguments to the compiled kernel: bits, indices, counts, cost of the minimum."""
    scores, costs, segments, kinds, limits, *rest, n_segments = call
    bits, indices, counts, least = _unit_buffers(scores, n_segments)
    least[0] = native.select_units(
        scores.double().contiguous(),
        None if costs is None else costs.double().contiguous(),
        None if segments is None else segments.long().contiguous(),
        None if kinds is None else kinds.long().contiguous(),
        limits.contiguous(),
        *rest,
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


def _checked_units(*arguments: Any) -> Units:
    call = Units(*arguments)
    check_units(call)
    return call


def _fill(*call: Any) -> Tensor:
    _check_order(*call)
    return reference.fill_in_order(*call)


def _fill_on_device(*call: Any) -> Tensor:
    _check_order(*call)
    if native_refusal("fill_in_order", "cuda") is None:
        return native.fill_in_order(*call)
    from sensikernels.ops.select_kept import triton

    return triton.fill_in_order(*call)


def _fake_fill(*call: Any) -> Tensor:
    _check_order(*call)
    cost: Tensor = call[0]
    return cost.new_empty(cost.shape, dtype=torch.bool)


def _check_order(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> None:
    check_order(cost, segment, free, left, segments)


_library.impl("select_elements", _select_elements, "CPU")
_library.impl("select_elements", _select_elements, "CUDA")
_library.impl("select_units", lambda *call: launch_units(_checked_units(*call)), "CPU")
_library.impl("fill_in_order", _fill, "CPU")
_library.impl("fill_in_order", _fill_on_device, "CUDA")
for _name, _fake in {
    "select_elements": lambda *call: _checked(*call).arena(),
    "select_units": lambda *call: _unit_buffers(_checked_units(*call).scores, call[-1]),
    "fill_in_order": _fake_fill,
}.items():
    torch.library.register_fake(f"sensikernels::{_name}", _fake, lib=_library)
