"""The public function ``select_elements``: exactly k of up to billions of entries, as bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from sensikernels._core.bits import pack_bits, unpack_bits
from sensikernels._core.checks import expected, require, require_one_of
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.lists import choice
from sensikernels.ops.select_kept import ops as _registered  # noqa: F401
from sensikernels.ops.select_kept.checks import ALIGN
from sensikernels.ops.select_kept.reference import descending, sort_keys

SCORES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "value": lambda w, g: w,
    "abs_value": lambda w, g: w.abs(),
    "abs_wg": lambda w, g: (w * g).abs(),
    "grad_squared": lambda w, g: g.square(),
}
"""Their order is the code the kernels take."""

NEEDS_GRAD: Final = ("abs_wg", "grad_squared")


@dataclass(frozen=True, kw_only=True)
class KeptElements:
    """Kept entries of a list of tensors: one bit per entry, row-major, little-endian in a byte."""

    arena: Tensor
    """uint8; bits past a tensor's end are 0."""
    offsets: tuple[int, ...]
    """First byte of each tensor, a multiple of 64."""
    shapes: tuple[tuple[int, ...], ...]
    threshold: Tensor
    """float32: the lowest score kept, ``[1]`` or ``[tensors]``; +inf where none is."""
    counts: Tensor
    """int64 ``[tensors]``: entries kept."""

    def packed(self, tensor: int) -> Tensor:
        """uint8 ``[ceil(numel / 8)]``: the bits of one tensor, a view."""
        start = self.offsets[tensor]
        return self.arena[start : start + -(-numel(self.shapes[tensor]) // 8)]

    def grid(self, tensor: int) -> Tensor:
        """bool in the tensor's shape."""
        shape = self.shapes[tensor]
        return unpack_bits(self.packed(tensor), numel(shape)).view(shape)


def numel(shape: Sequence[int]) -> int:
    """Number of entries of a shape."""
    total = 1
    for size in shape:
        total *= size
    return total


def keep_reference(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Bits of the best ``k`` of flat float32 scores, and the lowest score kept: the definition."""
    order = descending(sort_keys(scores))[:k]
    bits = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    bits[order] = True
    lowest = scores[order[-1:]] if k else scores.new_full((1,), torch.inf)
    return bits, lowest


def explain(tensors: Sequence[Tensor], backend: str = "auto") -> Choice:
    """The backend that ``select_elements`` takes for these tensors, and why."""
    return choice("select_elements", tensors, backend)


def counts_wanted(k: int | Sequence[int], sizes: Sequence[int], scope: str) -> list[int]:
    """Checked counts: one for all, or one per tensor."""
    if scope == "global":
        total = sum(sizes)
        ok = isinstance(k, int) and 0 <= k <= total
        require(ok, "k", f"an integer in [0, {total}]", k)
        assert isinstance(k, int)
        return [k]
    wanted = [k] * len(sizes) if isinstance(k, int) else list(k)
    require(len(wanted) == len(sizes), "k", f"one count per tensor, {len(sizes)}", len(wanted))
    for i, (count, size) in enumerate(zip(wanted, sizes, strict=True)):
        require(0 <= count <= size, f"k[{i}]", f"an integer in [0, {size}]", count)
    return wanted


@torch.no_grad()
def select_elements(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    *,
    k: int | Sequence[int],
    score: Literal["value", "abs_value", "abs_wg", "grad_squared"] = "value",
    scope: Literal["global", "per_tensor"] = "global",
    backend: str = "auto",
) -> KeptElements:
    """Keep exactly ``k`` entries with the highest score, without a sort and without a score array.

    Ties go to the lowest tensor, then the lowest entry in row-major order; NaN ranks below -inf.
    Scores are float32 whatever the tensors are.

    Args:
        tensors: float32, bfloat16 or float16, any shapes: scores, or weights.
        grads: gradients of the same shapes, for ``"abs_wg"`` and ``"grad_squared"``.
        k: how many entries; for ``scope="per_tensor"`` an int for each or one per tensor.
        score: ``"value"`` t, ``"abs_value"`` |t|, ``"abs_wg"`` |t·g|, ``"grad_squared"`` g².
        scope: over all tensors together, or in every tensor by itself.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`KeptElements`: packed bits, threshold and counts.

    Raises:
        UsageError: arguments that do not fit, or a named backend that cannot serve the call.
    """
    require_one_of(score, "score", SCORES)
    require_one_of(scope, "scope", ("global", "per_tensor"))
    pairs = _pairs(tensors, grads, score)
    sizes = [t.numel() for t in tensors]
    wanted = counts_wanted(k, sizes, scope)
    served = explain([*tensors, *(grads or ())], backend).backend
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // (8 * ALIGN)) * ALIGN
    if served != "reference" and tensors:
        code = list(SCORES).index(score)
        arena, threshold, counts = torch.ops.sensikernels.select_elements(
            list(tensors), pairs, offsets, end, wanted, code, served
        )
    else:
        arena, threshold, counts = _reference(
            tensors, pairs, offsets, end, wanted, SCORES[score], scope == "per_tensor"
        )
    shapes = tuple(tuple(t.shape) for t in tensors)
    return KeptElements(
        arena=arena, offsets=tuple(offsets), shapes=shapes, threshold=threshold, counts=counts
    )


def _pairs(tensors: Sequence[Tensor], grads: Sequence[Tensor] | None, score: str) -> list[Tensor]:
    """Partners of the tensors in their scores, checked: gradients, or themselves without any."""
    if (score in NEEDS_GRAD) != (grads is not None):
        if grads is None:
            raise expected("grads", f"gradients, which {score} needs", "none")
        raise expected("grads", f"none, as {score} needs none", "gradients")
    pairs = list(grads) if grads is not None else list(tensors)
    require(len(pairs) == len(tensors), "grads", f"{len(tensors)} tensors", len(pairs))
    for i, (t, g) in enumerate(zip(tensors, pairs, strict=True)):
        require(t.is_floating_point(), f"tensors[{i}]", "a floating dtype", t.dtype)
        require(g.is_floating_point(), f"grads[{i}]", "a floating dtype", g.dtype)
        require(t.shape == g.shape, f"grads[{i}]", f"shape {tuple(t.shape)}", tuple(g.shape))
        device = tensors[0].device
        same = t.device == g.device == device
        require(same, f"tensors[{i}]", f"device {device}", f"{t.device}, {g.device}")
    return pairs


def _reference(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
    end: int,
    wanted: Sequence[int],
    score: Callable[[Tensor, Tensor], Tensor],
    per_tensor: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort all scores: arena, threshold and counts."""
    device = tensors[0].device if tensors else torch.device("cpu")
    scores = [
        score(t.reshape(-1).float(), g.reshape(-1).float())
        for t, g in zip(tensors, grads, strict=True)
    ]
    if per_tensor:
        kept = [keep_reference(s, k) for s, k in zip(scores, wanted, strict=True)]
        bits = [b for b, _ in kept]
        threshold = torch.cat([torch.empty(0, device=device), *(lowest for _, lowest in kept)])
    else:
        merged = torch.cat([torch.empty(0, device=device), *scores])
        all_bits, threshold = keep_reference(merged, wanted[0])
        bits = list(all_bits.split([s.numel() for s in scores]))
    arena = torch.zeros(end, dtype=torch.uint8, device=device)
    for b, start in zip(bits, offsets, strict=True):
        arena[start : start + -(-b.numel() // 8)] = pack_bits(b)
    counts = torch.stack([b.sum() for b in bits]) if bits else arena.new_zeros(0, dtype=torch.int64)
    return arena, threshold, counts
