"""Kept entries of a parameter, and the place of each in compact state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from sensikernels._core.bits import pack_bits, unpack_bits
from sensikernels._core.checks import require, require_one_of

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

    Buffers have room for more units than are kept, so that another choice fits in place.

    ``index``: int32 [room], the kept units ascending, then the number of units as padding; or
    uint8 packed bits for ``elements``.
    ``offsets``: int64 [ceil(numel / SPAN)], kept entries before each span, for ``elements``.
    """

    kind: str
    shape: torch.Size
    index: Tensor | None = None
    block_shape: tuple[int, int] = (0, 0)
    offsets: Tensor | None = None
    count: int
    """Kept entries."""
    units: int
    """Kept rows, columns or blocks; entries for the other kinds."""
    room: int
    """Units that fit into state of this layout; all are kept for ``all`` and ``columns``."""
    lasting: bool = False
    """The room was asked for: without a choice all units are kept, in the same buffers."""

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a per-entry state tensor."""
        rows, _ = matrix_shape(self.shape)
        if self.kind == "all":
            return tuple(self.shape)
        if self.kind == "rows":
            return (self.room, *self.shape[1:])
        if self.kind == "columns":
            return rows, self.room
        return (self.room, *self.block_shape) if self.kind == "blocks" else (self.room,)

    def live(self, state: Tensor) -> Tensor:
        """The part of a state tensor that belongs to kept entries, a view."""
        return state if self.kind in ("all", "columns") else state[: self.units]

    def _units(self) -> Tensor:
        assert self.index is not None
        return self.index[: self.units].long()

    def _view(self, full: Tensor) -> tuple[Tensor, Any]:
        """A view of ``full`` and the index that takes the kept entries out of it."""
        rows, columns = matrix_shape(self.shape)
        if self.kind == "all" or self.index is None:
            return full, ...
        if self.kind == "rows":
            return full.view(self.shape if self.shape else (1,)), self._units()
        if self.kind == "columns":
            return full.view(rows, columns), (slice(None), self._units())
        if self.kind == "blocks":
            high, wide = self.block_shape
            grid = full.view(rows // high, high, columns // wide, wide).transpose(1, 2)
            across, index = columns // wide, self._units()
            return grid, (index // across, index % across)
        return full.view(-1), unpack_bits(self.index, full.numel())

    def gather(self, full: Tensor) -> Tensor:
        """Kept entries of a contiguous ``full`` tensor: a new tensor, as ``live`` gives them."""
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

    def everything(self) -> tuple[Any, ...]:
        """The choice of all units of this kind, as ``make_layout`` takes it."""
        device = None if self.index is None else self.index.device
        if self.kind == "elements":
            flags = torch.ones(math.prod(self.shape), dtype=torch.bool, device=device)
            return "elements", pack_bits(flags)
        units = unit_count(self.shape, self.kind, self.block_shape)
        index = torch.arange(units, dtype=torch.int32, device=device)
        return (self.kind, index, self.block_shape)

    def by_elements(self) -> KeptLayout:
        """The same entries by packed bits."""
        if self.kind in ("all", "elements"):
            return self
        return _elements(self.shape, pack_bits(self.flags().flatten()), 0)

    def in_room_of(self, other: KeptLayout) -> KeptLayout:
        """This choice with buffers as large as those of ``other``, if it fits into them."""
        alike = self.kind == other.kind and self.block_shape == other.block_shape
        if not alike or self.units > other.room or self.kind in ("all", "columns"):
            return self
        return self.with_room(other.room, lasting=other.lasting)

    def lasts_as(self, other: KeptLayout) -> bool:
        """True if ``other`` fits the memory that this layout reserved."""
        return self.lasting and self.kind == other.kind

    def with_room(self, room: int, *, lasting: bool) -> KeptLayout:
        """The same choice in buffers for ``room`` units."""
        index = self.index
        if self.kind in ("rows", "blocks") and index is not None:
            none = unit_count(self.shape, self.kind, self.block_shape)
            index = index.new_full((room,), none)
            index[: self.units] = self._units()
        return replace(self, index=index, room=room, lasting=lasting)

    def to_state(self) -> dict[str, Any]:
        """The layout as strings, integers and its own tensors, for the optimizer's state."""
        return {name: getattr(self, name) for name in _SAVED}

    @staticmethod
    def from_state(shape: torch.Size, saved: dict[str, Any]) -> KeptLayout:
        """Inverse of ``to_state``; shares its tensors."""
        return KeptLayout(shape=shape, **{**saved, "block_shape": tuple(saved["block_shape"])})

    @staticmethod
    def checked(shape: torch.Size, saved: dict[str, Any]) -> KeptLayout:
        """A layout of its own from what a checkpoint holds. Raises ``UsageError``."""
        kind, index = saved["kind"], saved["index"]
        kept = (kind, index, tuple(saved["block_shape"])) if kind == "blocks" else (kind, index)
        layout = make_layout(shape, None if kind == "all" else kept, index, saved.get("room", 0))
        return replace(layout, lasting=saved.get("lasting", False))

    def write_to(self, saved: dict[str, Any]) -> bool:
        """Replace what ``to_state`` gave, in place; False, and nothing, if sizes differ."""
        mine = self.to_state()
        for name, value in mine.items():
            held = saved.get(name)
            if isinstance(value, Tensor):
                if not isinstance(held, Tensor) or held.shape != value.shape:
                    return False
            elif name in _FIXED and held != value:
                return False
        for name, value in mine.items():
            if isinstance(value, Tensor):
                saved[name].copy_(value)
            else:
                saved[name] = value
        return True


_SAVED: Final = ("kind", "index", "block_shape", "offsets", "count", "units", "room", "lasting")
_FIXED: Final = ("kind", "block_shape", "index", "offsets", "room")


def unit_count(shape: torch.Size, kind: str, block_shape: tuple[int, int]) -> int:
    """Units a parameter of ``shape`` has: rows, columns, blocks, or else entries."""
    rows, columns = matrix_shape(shape)
    if kind == "rows":
        return rows
    if kind == "columns":
        return columns
    if kind == "blocks":
        return rows // block_shape[0] * (columns // block_shape[1])
    return rows * columns


def make_layout(
    shape: torch.Size, kept: tuple[Any, ...] | None, like: Tensor | None, room: int = 0
) -> KeptLayout:
    """Check a ``kept`` description for a parameter of ``shape`` and lay it out.

    ``kept``: None (all) | ("rows", index) | ("columns", index) |
    ("blocks", index, (height, width)), index into the row-major grid of blocks |
    ("elements", bits). Index entries equal to the number of units are padding. ``like`` names the
    device. ``room``: units its buffers are for, if that is more than are kept; not for columns,
    whose state has a stride. Raises ``UsageError``.
    """
    if kept is None:
        numel = math.prod(shape)
        return KeptLayout(kind="all", shape=shape, count=numel, units=numel, room=numel)
    known = ("rows", "columns", "blocks", "elements")
    require(isinstance(kept, tuple) and len(kept) >= 2, "kept", "None or (kind, index)", kept)
    kind, index = kept[0], kept[1]
    require_one_of(kind, "kept[0]", known)
    require(isinstance(index, Tensor) and index.dim() == 1, "kept[1]", "a 1-D tensor", index)
    device = index.device if like is None else like.device
    index = index.detach().to(device)
    if kind == "elements":
        return _elements(shape, index.clone(), room)
    rows, columns = matrix_shape(shape)
    block = (0, 0)
    if kind == "columns":
        require(len(shape) > 1, "kept", "rows or elements for a parameter below 2-D", "columns")
    elif kind == "blocks":
        require(len(kept) == 3, "kept", '("blocks", index, (height, width))', kept)
        block = (int(kept[2][0]), int(kept[2][1]))
        fits = min(block) > 0 and rows % block[0] == 0 and columns % block[1] == 0
        require(fits, "kept[2]", f"a block that divides {rows} x {columns}", block)
    units = unit_count(shape, kind, block)
    require(index.dtype == torch.int32, "kept[1]", "int32", index.dtype)
    index = index[index != units]
    taken = index.numel()
    if taken:
        ascending = bool((index[1:] > index[:-1]).all())
        inside = int(index[0]) >= 0 and int(index[-1]) < units
        expected = f"ascending indices in [0, {units})"
        require(ascending and inside, "kept[1]", expected, "others")
    require(0 <= room <= units, "capacity", f"at most {units} {kind}", room)
    none = kind == "columns" and room > taken
    require(not none, "capacity", "none for columns, whose state has a stride", room)
    layout = KeptLayout(
        kind=kind,
        shape=shape,
        index=index,
        block_shape=block,
        count=taken * (rows * columns // max(units, 1)),
        units=taken,
        room=taken,
    )
    return layout.with_room(room, lasting=False) if room > taken else layout


def _elements(shape: torch.Size, bits: Tensor, room: int) -> KeptLayout:
    numel = math.prod(shape)
    size = -(-numel // 8)
    fits = bits.dtype == torch.uint8 and bits.numel() == size
    require(fits, "kept[1]", f"uint8 bits [{size}]", f"{bits.dtype} {list(bits.shape)}")
    spare = bool(numel % 8 and int(bits[-1]) >> (numel % 8))
    require(not spare, "kept[1]", "zeros in the spare bits of the last byte", "ones")
    require(0 <= room <= numel, "capacity", f"at most {numel} elements", room)
    counts = popcounts(bits, numel)
    offsets, count = counts.cumsum(0) - counts, int(counts.sum())
    return KeptLayout(
        kind="elements",
        shape=shape,
        index=bits,
        offsets=offsets,
        count=count,
        units=count,
        room=max(count, room),
    )


def popcounts(bits: Tensor, numel: int) -> Tensor:
    """Set bits in each SPAN entries of packed ``bits``: int64 [ceil(numel / SPAN)]."""
    spans = -(-numel // SPAN)
    padded = bits.new_zeros(spans * SPAN // 8)
    padded[: bits.numel()] = bits
    per_byte = torch.stack([(padded >> k) & 1 for k in range(8)]).sum(0)
    return per_byte.view(spans, SPAN // 8).sum(1)
