"""Index tensors that say which entries of a weight are stored, and how: a mask made executable.

A layout is built once per mask change; nothing here runs in a training step. ``values`` are the
kept entries in the layout's own shape (``values_shape``); ``pack`` and ``unpack`` are each other's
inverse on them and both differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._checks import require


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLayout:
    """Kept rows x kept columns of a weight ``[out_features, in_features]``: a smaller matrix.

    ``rows`` and ``columns`` are ascending int32 indices; None keeps all. ``values`` is
    ``[kept_out, kept_in]``. With ``compact_input`` the layer reads ``[..., kept_in]``, with
    ``compact_output`` it writes ``[..., kept_out]``.
    """

    shape: tuple[int, int]
    rows: Tensor | None
    columns: Tensor | None
    compact_input: bool = False
    compact_output: bool = False

    # Derived, and fields rather than properties: every call of a layer reads them.
    values_shape: tuple[int, ...] = field(init=False, repr=False)
    """``(kept_out, kept_in)``."""
    in_width: int = field(init=False, repr=False)
    """Features the layer reads."""
    out_width: int = field(init=False, repr=False)
    """Features the layer writes."""
    gather_columns: Tensor | None = field(init=False, repr=False)
    """Columns of the input to read; None: it is used as it comes."""
    scatter_rows: Tensor | None = field(init=False, repr=False)
    """Columns of the output to write; None: it is written as it comes."""
    direct: bool = field(init=False, repr=False)
    """Nothing to gather or scatter: the layer is a plain linear on ``values``."""
    kept_entries: int = field(init=False, repr=False)
    """Weight entries kept."""
    density: float = field(init=False, repr=False)
    """Kept share of the weight's entries, 0 to 1."""
    chosen: dict[Any, Any] = field(init=False, repr=False)
    """What ``backend="auto"`` chose, by dtype and size class of the input: asked for every call."""

    def __post_init__(self) -> None:
        height, width = _count(self.rows, self.shape[0]), _count(self.columns, self.shape[1])
        gather = None if self.compact_input else self.columns
        scatter = None if self.compact_output else self.rows
        vars(self).update(
            values_shape=(height, width),
            in_width=width if self.compact_input else self.shape[1],
            out_width=height if self.compact_output else self.shape[0],
            gather_columns=gather,
            scatter_rows=scatter,
            direct=gather is None and scatter is None,
            kept_entries=height * width,
            density=height * width / (self.shape[0] * self.shape[1] or 1),
            chosen={},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLayout:
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
    """

    shape: tuple[int, int]
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
    values_shape: tuple[int, ...] = field(init=False, repr=False)
    """``(n_blocks, bm, bn)``."""
    in_width: int = field(init=False, repr=False)
    """Features the layer reads."""
    out_width: int = field(init=False, repr=False)
    """Features the layer writes."""
    density: float = field(init=False, repr=False)
    """Kept share of the weight's entries, 0 to 1."""
    chosen: dict[Any, Any] = field(init=False, repr=False)
    """What ``backend="auto"`` chose, by dtype and size class of the input: asked for every call."""

    def __post_init__(self) -> None:
        n_blocks = self.col_idx.shape[0]
        vars(self).update(
            n_blocks=n_blocks,
            grid_shape=(self.row_ptr.shape[0] - 1, self.row_ptr_t.shape[0] - 1),
            values_shape=(n_blocks, *self.block_shape),
            in_width=_count(self.columns, self.shape[1]),
            out_width=_count(self.rows, self.shape[0]),
            density=self.kept_entries / (self.shape[0] * self.shape[1] or 1),
            chosen={},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ElementLayout:
    """Single kept entries: ``index`` is ascending int32 into the flattened weight.

    ``values`` is ``[n]``. Runs dense on the unpacked weight: exact, but no faster than dense.
    """

    shape: tuple[int, int]
    index: Tensor

    rows: ClassVar[None] = None
    columns: ClassVar[None] = None
    compact_input: ClassVar[bool] = False
    compact_output: ClassVar[bool] = False
    direct: ClassVar[bool] = False

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(n,)``."""
        return (self.index.shape[0],)

    @property
    def in_width(self) -> int:
        """Features the layer reads."""
        return self.shape[1]

    @property
    def out_width(self) -> int:
        """Features the layer writes."""
        return self.shape[0]

    @property
    def kept_entries(self) -> int:
        """Weight entries kept."""
        return self.index.shape[0]

    @property
    def density(self) -> float:
        """Kept share of the weight's entries, 0 to 1."""
        return self.index.shape[0] / (self.shape[0] * self.shape[1] or 1)


Layout: TypeAlias = PackedLayout | BlockLayout | ElementLayout


def to_device(layout: Layout, device: torch.device | str) -> Layout:
    """The same layout with its index tensors on ``device``."""
    values = {f.name: getattr(layout, f.name) for f in fields(layout) if f.init}
    moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(layout, **moved)


def layout_of(
    grid: Tensor,
    block_shape: tuple[int, int],
    shape: tuple[int, int],
    *,
    compact_input: bool = False,
    compact_output: bool = False,
) -> Layout:
    """The cheapest layout of a mask ``grid`` (bool ``[R, C]``) over tiles of ``block_shape``.

    Packed where the grid is an outer product of kept rows and kept columns, elements for
    ``(1, 1)`` tiles, blocks otherwise. The last tile of a row or column may be cut by the edge.

    Raises:
        UsageError: the grid is not a bool matrix of that size; elements asked to be compact.
    """
    expected = [-(-n // b) for n, b in zip(shape, block_shape, strict=True)]
    require(grid.dtype == torch.bool, "grid", "dtype torch.bool", grid.dtype)
    require(list(grid.shape) == expected, "grid", f"shape {expected}", list(grid.shape))
    kept_rows, kept_columns = grid.any(1), grid.any(0)
    compact = {"compact_input": compact_input, "compact_output": compact_output}
    if grid.shape[0] == 1:
        kept_rows = torch.ones_like(kept_rows)
    elif grid.shape[1] == 1:
        kept_columns = torch.ones_like(kept_columns)
    if torch.equal(grid, kept_rows[:, None] & kept_columns):
        return PackedLayout(
            shape=shape,
            rows=_features(kept_rows, block_shape[0], shape[0]),
            columns=_features(kept_columns, block_shape[1], shape[1]),
            **compact,
        )
    if block_shape == (1, 1):
        require(not (compact_input or compact_output), "compact", "False for elements", "True")
        return ElementLayout(shape=shape, index=_indices(grid.flatten()))
    rows = _features(kept_rows, block_shape[0], shape[0]) if compact_output else None
    columns = _features(kept_columns, block_shape[1], shape[1]) if compact_input else None
    seen = grid if rows is None else grid[kept_rows]
    seen = seen if columns is None else seen[:, kept_columns]
    return _block_layout(grid, seen, block_shape, shape, rows, columns, **compact)


def pack(weight: Tensor, layout: Layout, *, compact: bool = False) -> Tensor:
    """The kept entries of ``weight [out_features, in_features]``, shaped ``values_shape``.

    ``compact``: ``weight`` has only the features of ``layout.rows`` and ``layout.columns``.
    Returns ``weight`` itself when a packed layout keeps all of it. Differentiable.
    """
    if not compact:
        require(tuple(weight.shape) == layout.shape, "weight", layout.shape, tuple(weight.shape))
    if isinstance(layout, ElementLayout):
        return weight.flatten().index_select(0, layout.index)
    packed = weight if compact else _take(_take(weight, 0, layout.rows), 1, layout.columns)
    if isinstance(layout, PackedLayout):
        return packed
    (n_rows, n_columns), (height, width) = layout.grid_shape, layout.block_shape
    padding = (0, n_columns * width - packed.shape[1], 0, n_rows * height - packed.shape[0])
    tiles = F.pad(packed, padding).reshape(n_rows, height, n_columns, width)
    return tiles[layout.row_idx, :, layout.col_idx]


def unpack(values: Tensor, layout: Layout, *, compact: bool = False) -> Tensor:
    """The weight ``[out_features, in_features]`` with ``values`` kept and zeros elsewhere.

    With ``compact`` the weight the layer multiplies by: ``[out_width, in_width]``. Differentiable;
    returns ``values`` itself when they are that weight.
    """
    ok = tuple(values.shape) == layout.values_shape
    require(ok, "values", list(layout.values_shape), list(values.shape))
    if isinstance(layout, ElementLayout):
        flat = values.new_zeros(layout.shape[0] * layout.shape[1])
        return flat.index_copy(0, layout.index.long(), values).view(layout.shape)
    matrix = values if isinstance(layout, PackedLayout) else _untile(values, layout)
    if not (compact and layout.compact_input):
        matrix = _put(matrix, 1, layout.columns, layout.shape[1])
    if not (compact and layout.compact_output):
        matrix = _put(matrix, 0, layout.rows, layout.shape[0])
    return matrix


def assign_(weight: Tensor, values: Tensor, layout: Layout) -> None:
    """Write ``values`` over the kept entries of ``weight [out_features, in_features]`` in place."""
    if isinstance(layout, ElementLayout):
        weight.view(-1).index_copy_(0, layout.index.long(), values)
    elif isinstance(layout, BlockLayout):
        kept = unpack(torch.ones_like(values), layout).bool()
        weight.copy_(torch.where(kept, unpack(values, layout), weight))
    elif layout.rows is None and layout.columns is None:
        weight.copy_(values)
    elif layout.columns is None:
        assert layout.rows is not None
        weight.index_copy_(0, layout.rows.long(), values)
    elif layout.rows is None:
        weight.index_copy_(1, layout.columns.long(), values)
    else:
        weight.index_put_((layout.rows.long()[:, None], layout.columns.long()), values)


def _untile(values: Tensor, layout: BlockLayout) -> Tensor:
    (n_rows, n_columns), (height, width) = layout.grid_shape, layout.block_shape
    tiles = values.new_zeros(n_rows, n_columns, height, width)
    tiles = tiles.index_put((layout.row_idx, layout.col_idx), values)
    matrix = tiles.transpose(1, 2).reshape(n_rows * height, n_columns * width)
    return matrix[: layout.out_width, : layout.in_width]


def _block_layout(
    grid: Tensor,
    seen: Tensor,
    block_shape: tuple[int, int],
    shape: tuple[int, int],
    rows: Tensor | None,
    columns: Tensor | None,
    *,
    compact_input: bool,
    compact_output: bool,
) -> BlockLayout:
    row_idx, col_idx = seen.nonzero().unbind(1)
    perm_t = torch.argsort(col_idx, stable=True)
    per_row, per_column = seen.sum(1), seen.sum(0)
    full = PackedLayout(shape=shape, rows=None, columns=None)
    heights, widths = (
        torch.arange(n, device=grid.device).mul(-b).add(size).clamp(max=b)
        for n, b, size in zip(grid.shape, block_shape, full.shape, strict=True)
    )
    return BlockLayout(
        shape=shape,
        block_shape=block_shape,
        row_ptr=_pointers(per_row),
        col_idx=col_idx.int(),
        row_idx=row_idx.int(),
        row_ptr_t=_pointers(per_column),
        row_idx_t=row_idx[perm_t].int(),
        perm_t=perm_t.int(),
        row_order=torch.argsort(per_row, descending=True, stable=True).int(),
        row_order_t=torch.argsort(per_column, descending=True, stable=True).int(),
        kept_entries=int((heights[:, None] * widths * grid).sum()),
        rows=rows,
        columns=columns,
        compact_input=compact_input,
        compact_output=compact_output,
    )


def _indices(kept: Tensor) -> Tensor:
    return kept.nonzero().flatten().int()


def _pointers(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _features(kept: Tensor, band: int, features: int) -> Tensor | None:
    """Kept features of kept bands; None when all are kept."""
    if bool(kept.all()):
        return None
    return _indices(kept.repeat_interleave(band)[:features])


def _count(index: Tensor | None, features: int) -> int:
    return features if index is None else index.shape[0]


def _take(matrix: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return matrix if index is None else matrix.index_select(axis, index)


def _put(matrix: Tensor, axis: int, index: Tensor | None, size: int) -> Tensor:
    if index is None:
        return matrix
    shape = [size, matrix.shape[1]] if axis == 0 else [matrix.shape[0], size]
    return matrix.new_zeros(shape).index_copy(axis, index.long(), matrix)


_BLOCK_TENSORS = (
    "row_ptr", "col_idx", "row_idx", "row_ptr_t", "row_idx_t", "perm_t", "row_order", "row_order_t",
)  # fmt: skip


def to_arguments(layout: PackedLayout | BlockLayout) -> tuple[list[int], list[Tensor]]:
    """The layout as an operator's schema can carry it; ``from_arguments`` reads it back."""
    ends = [layout.rows, layout.columns]
    index = [t for t in ends if t is not None]
    flags = [layout.compact_input, layout.compact_output, *(t is not None for t in ends)]
    sizes = [layout.kept_entries, *layout.shape, *map(int, flags)]
    if isinstance(layout, BlockLayout):
        sizes += layout.block_shape
        index += [getattr(layout, name) for name in _BLOCK_TENSORS]
    return sizes, index


def from_arguments(sizes: list[int], index: list[Tensor]) -> PackedLayout | BlockLayout:
    """The inverse of ``to_arguments``."""
    kept_entries, out_features, in_features, *flags = sizes[:7]
    rest = iter(index)
    ends = [next(rest) if given else None for given in flags[2:]]
    if len(sizes) == 7:
        return PackedLayout(
            shape=(out_features, in_features),
            rows=ends[0],
            columns=ends[1],
            compact_input=bool(flags[0]),
            compact_output=bool(flags[1]),
        )
    return BlockLayout(
        shape=(out_features, in_features),
        block_shape=(sizes[7], sizes[8]),
        kept_entries=kept_entries,
        rows=ends[0],
        columns=ends[1],
        compact_input=bool(flags[0]),
        compact_output=bool(flags[1]),
        **dict(zip(_BLOCK_TENSORS, rest, strict=True)),
    )
