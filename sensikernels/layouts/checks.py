"""Checks of a layout: shapes, dtypes and devices when it is made, values before its first use.

They run once, as a layout is frozen. Values are looked at where ``values.readable`` allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.checks import expected, require
from sensikernels._core.values import readable, require_within

BLOCK_TENSORS = (
    "row_ptr",
    "col_idx",
    "row_idx",
    "row_ptr_t",
    "row_idx_t",
    "perm_t",
    "row_order",
    "row_order_t",
)
"""Index tensors of a ``BlockLayout``, in the order in which an operator's schema carries them."""


class Grid(NamedTuple):
    """Sizes of a layout of blocks, each for rows and columns."""

    lines: tuple[int, int]
    """Block rows and block columns."""
    sides: tuple[int, int]
    """Height and width of a block."""
    features: tuple[int, int]
    """Features written and features read."""


def check_shape(shape: Sequence[int], name: str, least: int) -> None:
    """Two integers of at least ``least``."""
    if len(shape) != 2 or not all(isinstance(n, int) and n >= least for n in shape):
        raise expected(name, f"two integers >= {least}", tuple(shape))


def check_index(
    index: Tensor, name: str, size: int | None = None, device: torch.device | None = None
) -> None:
    """int32 ``[size]``, on ``device`` if one is given."""
    ok = isinstance(index, Tensor) and index.dtype == torch.int32 and index.dim() == 1
    if not ok or (size is not None and index.shape[0] != size):
        got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index)
        raise expected(name, f"int32 [{'n' if size is None else size}]", got)
    if device is not None and index.device != device:
        raise expected(name, f"a tensor on {device}", index.device)


def check_feature_shapes(
    shape: tuple[int, int],
    rows: Tensor | None,
    columns: Tensor | None,
    device: torch.device | None = None,
) -> None:
    """``rows`` and ``columns``: index tensors on one device, if any."""
    check_shape(shape, "shape", 0)
    for name, index in (("rows", rows), ("columns", columns)):
        if index is not None:
            check_index(index, name, device=device)
            device = index.device


def check_features(shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None) -> None:
    """``rows`` and ``columns``: ascending features of a weight of ``shape``."""
    for name, index, features in zip(("rows", "columns"), (rows, columns), shape, strict=True):
        if index is not None:
            require_within(index, name, features, ascending=True)


def check_elements(shape: tuple[int, int], index: Tensor) -> None:
    """``index``: ascending entries of a weight of ``shape``."""
    require_within(index, "index", shape[0] * shape[1], ascending=True)


def check_block_shapes(index: Mapping[str, Tensor], grid: Grid) -> None:
    """``BLOCK_TENSORS``: int32, of sizes that agree, on one device."""
    n, device = index["col_idx"].shape[0], index["col_idx"].device
    rows, columns = grid.lines
    sizes = dict.fromkeys(("col_idx", "row_idx", "row_idx_t", "perm_t"), n)
    sizes |= {"row_ptr": rows + 1, "row_ptr_t": columns + 1}
    sizes |= {"row_order": rows, "row_order_t": columns}
    for name, size in sizes.items():
        check_index(index[name], name, size, device)
    for name, lines, side, width in zip(("row_ptr", "row_ptr_t"), *grid, strict=True):
        want = -(-width // side) + 1
        require(lines + 1 == want, name, f"int32 [{want}], {width} features by {side}", lines + 1)


def check_blocks(index: Mapping[str, Tensor], grid: Grid, kept_entries: int) -> None:
    """The values of ``BLOCK_TENSORS``, if they can be read."""
    if not readable(index["row_ptr"]):
        return
    arrays = (index[name].cpu().numpy().astype(np.int64) for name in BLOCK_TENSORS)
    ptr, col, row, ptr_t, row_t, perm, order, order_t = arrays
    (rows, columns), n = grid.lines, len(col)
    counts = _check_lines(ptr, "row_ptr", n)
    _require_same(row, np.repeat(np.arange(rows), counts), "row_idx", "each block's row")
    _check_rising(row * columns + col, col, "col_idx", columns)
    counts_t = _check_lines(ptr_t, "row_ptr_t", n)
    _check_permutation(perm, "perm_t", n)
    of_column = np.repeat(np.arange(columns), counts_t)
    _require_same(col[perm], of_column, "perm_t", "blocks column by column")
    _require_same(row_t, row[perm], "row_idx_t", "the rows of perm_t's blocks")
    _check_rising(of_column * rows + row_t, row_t, "row_idx_t", rows)
    for name, place, size in (("row_order", order, counts), ("row_order_t", order_t, counts_t)):
        _check_permutation(place, name, len(size))
        require(bool((np.diff(size[place]) <= 0).all()), name, "most blocks first", place[:8])
    heights, widths = (
        np.minimum(side, features - np.arange(lines) * side)
        for lines, side, features in zip(*grid, strict=True)
    )
    entries = int((heights[row] * widths[col]).sum())
    require(kept_entries == entries, "kept_entries", entries, kept_entries)


def _check_lines(pointers: np.ndarray, name: str, n: int) -> np.ndarray:
    """Blocks of each line; ``pointers`` rise from 0 to ``n``."""
    counts = np.diff(pointers)
    ok = pointers[0] == 0 and pointers[-1] == n and bool((counts >= 0).all())
    require(ok, name, f"offsets that rise from 0 to {n}", pointers[:8])
    return counts


def _check_rising(place: np.ndarray, index: np.ndarray, name: str, count: int) -> None:
    ok = bool(((index >= 0) & (index < count)).all() and (np.diff(place) > 0).all())
    require(ok, name, f"indices in [0, {count}), ascending in each line", index[:8])


def _check_permutation(index: np.ndarray, name: str, n: int) -> None:
    ok = bool((np.sort(index) == np.arange(n)).all())
    require(ok, name, f"every number in [0, {n}) once", index[:8])


def _require_same(index: np.ndarray, wanted: np.ndarray, name: str, meaning: str) -> None:
    require(bool((index == wanted).all()), name, f"{meaning}, {wanted[:8]} …", index[:8])
