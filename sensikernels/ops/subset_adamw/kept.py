"""Which entries of a parameter are kept, and where each sits in compact state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from sensikernels._bits import unpack_bits
from sensikernels._checks import require, require_one_of

KINDS: Final = ("all", "rows", "columns", "blocks", "elements")
SPAN: Final = 4096
"""Entries per rank offset of an ``elements`` layout; native code relies on it."""


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """``shape`` seen as [rows, columns]: a vector is a column, a scalar is [1, 1]."""
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptLayout:
    """Kept entries of one parameter of ``shape`` and the order of their compact state.

    ``index``: int32 ascending [kept units], or uint8 packed bits for ``elements``.
    ``offsets``: int64 [ceil(numel / SPAN)], kept entries before each span, for ``elements``.
    """

    kind: str
    shape: torch.Size
    index: Tensor | None = None
    block_shape: tuple[int, int] = (0, 0)
    offsets: Tensor | None = None
    count: int
    """Kept entries."""

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a per-entry state tensor."""
        rows, _ = matrix_shape(self.shape)
        units = 0 if self.index is None else self.index.numel()
        if self.kind == "all":
            return tuple(self.shape)
        if self.kind == "rows":
            return (units, *self.shape[1:])
        if self.kind == "columns":
            return rows, units
        return (units, *self.block_shape) if self.kind == "blocks" else (self.count,)

    def _view(self, full: Tensor) -> tuple[Tensor, Any]:
        """A view of ``full`` and the index that takes the kept entries out of it."""
        rows, columns = matrix_shape(self.shape)
        if self.kind == "all" or self.index is None:
            return full, ...
        if self.kind == "rows":
            return full.view(self.shape if self.shape else (1,)), self.index.long()
        if self.kind == "columns":
            return full.view(rows, columns), (slice(None), self.index.long())
        if self.kind == "blocks":
            high, wide = self.block_shape
            grid = full.view(rows // high, high, columns // wide, wide).transpose(1, 2)
            across, index = columns // wide, self.index.long()
            return grid, (index // across, index % across)
        return full.view(-1), unpack_bits(self.index, full.numel())

    def gather(self, full: Tensor) -> Tensor:
        """Kept entries of a contiguous ``full`` tensor, as a new tensor of ``state_shape``."""
        view, index = self._view(full)
        taken: Tensor = view[index]
        return taken.clone() if self.kind == "all" else taken

    def scatter_(self, full: Tensor, compact: Tensor) -> None:
        """Write compact entries to their places in a contiguous ``full`` tensor."""
        view, index = self._view(full)
        view[index] = compact

    def flags(self) -> Tensor:
        """bool tensor of ``shape``: True where kept."""
        device = None if self.index is None else self.index.device
        full = torch.zeros(self.shape, dtype=torch.bool, device=device)
        view, index = self._view(full)
        view[index] = True
        return full

    def to_state(self) -> dict[str, Any]:
        """The layout as strings, integers and its own tensors, for the optimizer's state."""
        names = ("kind", "index", "block_shape", "offsets", "count")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def from_state(shape: torch.Size, saved: dict[str, Any]) -> KeptLayout:
        """Inverse of ``to_state``; shares its tensors."""
        return KeptLayout(shape=shape, **{**saved, "block_shape": tuple(saved["block_shape"])})

    @staticmethod
    def checked(shape: torch.Size, saved: dict[str, Any]) -> KeptLayout:
        """A layout of its own from what a checkpoint holds. Raises ``UsageError``."""
        kind, index = saved["kind"], saved["index"]
        kept = (kind, index, tuple(saved["block_shape"])) if kind == "blocks" else (kind, index)
        return make_layout(shape, None if kind == "all" else kept, index)

    def take_(self, other: KeptLayout) -> bool:
        """Become ``other`` at the same addresses; False, and nothing, if kind or sizes differ."""
        mine, theirs = self.to_state(), other.to_state()
        pairs = [(mine.pop(name), theirs.pop(name)) for name in ("index", "offsets")]
        alike = all(
            a is b if a is None or b is None else a.shape == b.shape and a.device == b.device
            for a, b in pairs
        )
        if not alike or mine != theirs or self.shape != other.shape:
            return False
        for held, new in pairs:
            if held is not None:
                held.copy_(new)
        return True


def make_layout(shape: torch.Size, kept: tuple[Any, ...] | None, like: Tensor | None) -> KeptLayout:
    """Check a ``kept`` description for a parameter of ``shape`` and lay it out.

    ``kept``: None (all) | ("rows", index) | ("columns", index) |
    ("blocks", index, (height, width)), index into the row-major grid of blocks |
    ("elements", bits). Index entries equal to the number of units are padding. ``like`` names the
    device. Raises ``UsageError``.
    """
    numel = math.prod(shape)
    if kept is None:
        return KeptLayout(kind="all", shape=shape, count=numel)
    known = ("rows", "columns", "blocks", "elements")
    require(isinstance(kept, tuple) and len(kept) >= 2, "kept", "None or (kind, index)", kept)
    kind, index = kept[0], kept[1]
    require_one_of(kind, "kept[0]", known)
    require(isinstance(index, Tensor) and index.dim() == 1, "kept[1]", "a 1-D tensor", index)
    device = index.device if like is None else like.device
    index = index.detach().to(device).clone()
    if kind == "elements":
        return _elements(shape, numel, index)
    rows, columns = matrix_shape(shape)
    block, units, per_unit = (0, 0), rows, columns
    if kind == "columns":
        require(len(shape) > 1, "kept", "rows or elements for a parameter below 2-D", "columns")
        units, per_unit = columns, rows
    elif kind == "blocks":
        require(len(kept) == 3, "kept", '("blocks", index, (height, width))', kept)
        block = (int(kept[2][0]), int(kept[2][1]))
        fits = min(block) > 0 and rows % block[0] == 0 and columns % block[1] == 0
        require(fits, "kept[2]", f"a block that divides {rows} x {columns}", block)
        units, per_unit = rows // block[0] * (columns // block[1]), block[0] * block[1]
    require(index.dtype == torch.int32, "kept[1]", "int32", index.dtype)
    index = index[index != units]
    if index.numel():
        ascending = bool((index[1:] > index[:-1]).all())
        inside = int(index[0]) >= 0 and int(index[-1]) < units
        expected = f"ascending indices in [0, {units})"
        require(ascending and inside, "kept[1]", expected, "others")
    count = index.numel() * per_unit
    return KeptLayout(kind=kind, shape=shape, index=index, block_shape=block, count=count)


def _elements(shape: torch.Size, numel: int, bits: Tensor) -> KeptLayout:
    size = -(-numel // 8)
    fits = bits.dtype == torch.uint8 and bits.numel() == size
    require(fits, "kept[1]", f"uint8 bits [{size}]", f"{bits.dtype} {list(bits.shape)}")
    spare = bool(numel % 8 and int(bits[-1]) >> (numel % 8))
    require(not spare, "kept[1]", "zeros in the spare bits of the last byte", "ones")
    counts = popcounts(bits, numel)
    offsets, count = counts.cumsum(0) - counts, int(counts.sum())
    return KeptLayout(kind="elements", shape=shape, index=bits, offsets=offsets, count=count)


def popcounts(bits: Tensor, numel: int) -> Tensor:
    """Set bits in each SPAN entries of packed ``bits``: int64 [ceil(numel / SPAN)]."""
    spans = -(-numel // SPAN)
    padded = bits.new_zeros(spans * SPAN // 8)
    padded[: bits.numel()] = bits
    per_byte = torch.stack([(padded >> k) & 1 for k in range(8)]).sum(0)
    return per_byte.view(spans, SPAN // 8).sum(1)
