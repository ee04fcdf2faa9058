"""The three kinds of layout, which check what they are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from sensikernels.layouts import checks
from sensikernels.layouts.checks import BLOCK_TENSORS, Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class _Checked:
    """Fields that every layout derives when it is made; not properties, as each call reads them."""

    shape: tuple[int, int]
    """``(out_features, in_features)`` of the weight."""
    values_shape: tuple[int, ...] = field(init=False, repr=False)
    """Shape of the kept entries."""
    in_width: int = field(init=False, repr=False)
    """Features the layer reads."""
    out_width: int = field(init=False, repr=False)
    """Features the layer writes."""
    kind: str = field(init=False, repr=False)
    """``direct`` (nothing to gather or scatter: a plain linear on ``values``), ``rows`` (their
    results are scattered to full width), ``compact``, ``blocks`` or ``elements``."""
    block: int = field(init=False, repr=False, default=0)
    """The smaller side of a block; 0 without blocks."""
    density: float = field(init=False, repr=False)
    """Kept share of the weight's entries, 0 to 1."""
    device: torch.device | None = field(init=False, repr=False)
    """Where the index tensors lie; None if there are none."""
    sound: bool = field(init=False, repr=False, default=False)
    """The values of the index tensors have been checked, or follow from how they were made."""

    def check(self) -> None:
        """Raise UsageError unless the index tensors hold such a layout; looked at once.

        A traced graph cannot depend on what an index holds, so nothing is looked at there.
        """
        if not self.sound and not torch.compiler.is_compiling():
            self._check_values()
            vars(self)["sound"] = True

    @abstractmethod
    def _check_values(self) -> None:
        """Raise UsageError unless the index tensors hold such a layout."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CompactLayout(_Checked):
    """Kept rows x kept columns of a weight ``[out_features, in_features]``: a smaller matrix.

    ``rows`` and ``columns`` are ascending int32 indices; None keeps all. ``values`` is
    ``[kept_out, kept_in]``. With ``compact_input`` the layer reads ``[..., kept_in]``, with
    ``compact_output`` it writes ``[..., kept_out]``.

    Shapes and dtypes are checked when it is made, values by ``check`` before it is first used.
    Raises UsageError.
    """

    rows: Tensor | None
    columns: Tensor | None
    compact_input: bool = False
    compact_output: bool = False

    gather_columns: Tensor | None = field(init=False, repr=False)
    """Columns of the input to read; None: it is used as it comes."""
    scatter_rows: Tensor | None = field(init=False, repr=False)
    """Columns of the output to write; None: it is written as it comes."""
    direct: bool = field(init=False, repr=False)
    """Whether there is nothing to gather or scatter."""
    kept_entries: int = field(init=False, repr=False)
    """Weight entries kept."""

    def __post_init__(self) -> None:
        _make_contiguous(self, ("rows", "columns"))
        checks.check_feature_shapes(self.shape, self.rows, self.columns)
        height, width = _count(self.rows, self.shape[0]), _count(self.columns, self.shape[1])
        gather = None if self.compact_input else self.columns
        scatter = None if self.compact_output else self.rows
        direct = gather is None and scatter is None
        vars(self).update(
            kind="direct" if direct else "rows" if gather is None else "compact",
            values_shape=(height, width),
            in_width=width if self.compact_input else self.shape[1],
            out_width=height if self.compact_output else self.shape[0],
            density=_share(height * width, self.shape),
            device=next((t.device for t in (self.rows, self.columns) if t is not None), None),
            gather_columns=gather,
            scatter_rows=scatter,
            direct=direct,
            kept_entries=height * width,
        )

    def _check_values(self) -> None:
        checks.check_features(self.shape, self.rows, self.columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLayout(_Checked):
    """Kept blocks of a weight, row by row (block CSR) and, by index only, column by column.

    ``values`` is ``[n_blocks, bm, bn]``, contiguous, blocks ordered by (block row, block column);
    what a block at the weight's edge has beyond the edge is zero. All tensors are int32:

    - ``row_ptr [R + 1]``, ``col_idx [n_blocks]``: block columns of block row r are
      ``col_idx[row_ptr[r]:row_ptr[r + 1]]``, ascending; ``row_idx [n_blocks]`` is each block's row.
    - ``row_ptr_t [C + 1]``, ``row_idx_t [n_blocks]``, ``perm_t [n_blocks]``: block rows of block
      column c and where their blocks lie in ``values``: the transpose without a second copy.
    - ``row_order [R]``, ``row_order_t [C]``: block rows / block columns, most blocks first.

    ``R x C`` is the grid the layer sees: with ``compact_output`` (``compact_input``) empty block
    rows (columns) are gone from it, and ``rows`` (``columns``) holds the kept features.

    Shapes and dtypes are checked when it is made, values by ``check`` before it is first used.
    Raises UsageError.
    """

    block_shape: tuple[int, int]
    row_ptr: Tensor
    col_idx: Tensor
    row_idx: Tensor
    row_ptr_t: Tensor
    row_idx_t: Tensor
    perm_t: Tensor
    row_order: Tensor
    row_order_t: Tensor
    kept_entries: int
    rows: Tensor | None = None
    columns: Tensor | None = None
    compact_input: bool = False
    compact_output: bool = False
    direct: ClassVar[bool] = False

    n_blocks: int = field(init=False, repr=False)
    """Kept blocks."""
    grid_shape: tuple[int, int] = field(init=False, repr=False)
    """``(R, C)``: block rows and block columns the layer sees."""

    def __post_init__(self) -> None:
        checks.check_shape(self.block_shape, "block_shape", 1)
        _make_contiguous(self, ("rows", "columns", *BLOCK_TENSORS))
        for name, index in self._index().items():
            checks.check_index(index, name)
        checks.check_feature_shapes(self.shape, self.rows, self.columns, self.col_idx.device)
        n_blocks = self.col_idx.shape[0]
        vars(self).update(
            kind="blocks",
            block=min(self.block_shape),
            values_shape=(n_blocks, *self.block_shape),
            in_width=_count(self.columns, self.shape[1]),
            out_width=_count(self.rows, self.shape[0]),
            density=_share(self.kept_entries, self.shape),
            device=self.col_idx.device,
            n_blocks=n_blocks,
            grid_shape=(self.row_ptr.shape[0] - 1, self.row_ptr_t.shape[0] - 1),
        )
        checks.check_block_shapes(self._index(), self._grid())

    def _index(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in BLOCK_TENSORS}

    def _grid(self) -> Grid:
        return Grid(self.grid_shape, self.block_shape, (self.out_width, self.in_width))

    def _check_values(self) -> None:
        checks.check_features(self.shape, self.rows, self.columns)
        checks.check_blocks(self._index(), self._grid(), self.kept_entries)


@dataclass(frozen=True, kw_only=True, eq=False)
class ElementLayout(_Checked):
    """Single kept entries: ``index`` is ascending int32 into the flattened weight.

    ``values`` is ``[n]``. Runs dense on the full weight: exact, but no faster than dense.

    Shapes and dtypes are checked when it is made, values by ``check`` before it is first used.
    Raises UsageError.
    """

    index: Tensor

    rows: ClassVar[None] = None
    columns: ClassVar[None] = None
    compact_input: ClassVar[bool] = False
    compact_output: ClassVar[bool] = False
    direct: ClassVar[bool] = False

    kept_entries: int = field(init=False, repr=False)
    """Weight entries kept."""

    def __post_init__(self) -> None:
        _make_contiguous(self, ("index",))
        checks.check_shape(self.shape, "shape", 0)
        checks.check_index(self.index, "index")
        kept = self.index.shape[0]
        vars(self).update(
            kind="elements",
            values_shape=(kept,),
            in_width=self.shape[1],
            out_width=self.shape[0],
            density=_share(kept, self.shape),
            device=self.index.device,
            kept_entries=kept,
        )

    def _check_values(self) -> None:
        checks.check_elements(self.shape, self.index)


Layout: TypeAlias = CompactLayout | BlockLayout | ElementLayout


def to_device(layout: Layout, device: torch.device | str) -> Layout:
    """The same layout with its index tensors on ``device``."""
    values = {f.name: getattr(layout, f.name) for f in fields(layout) if f.init}
    moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
    there = replace(layout, **moved)
    return mark_sound(there) if layout.sound else there


AnyLayout = TypeVar("AnyLayout", bound=CompactLayout | BlockLayout | ElementLayout)


def mark_sound(layout: AnyLayout) -> AnyLayout:
    """``layout``, whose index tensors need no look."""
    vars(layout)["sound"] = True
    return layout


def _make_contiguous(layout: Layout, names: Sequence[str]) -> None:
    """Replace index tensors by contiguous ones, which is what kernels read."""
    for name in names:
        index = getattr(layout, name)
        if isinstance(index, Tensor) and not index.is_contiguous():
            vars(layout)[name] = index.contiguous()


def _count(index: Tensor | None, features: int) -> int:
    return features if index is None else index.shape[0]


def _share(kept: int, shape: tuple[int, int]) -> float:
    return kept / (shape[0] * shape[1] or 1)
