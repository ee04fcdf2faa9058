"""What a layout checks: shapes, dtypes and devices when it is made, values before its first use.

Once, for it is frozen. Values are looked at where ``_values.readable`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels._core.values import readable, require_within


class Blocks(Protocol):
    """The fields of a ``BlockLayout`` that have to agree."""

    @property
    def block_shape(self) -> tuple[int, int]: ...
    @property
    def grid_shape(self) -> tuple[int, int]: ...
    @property
    def out_width(self) -> int: ...
    @property
    def in_width(self) -> int: ...
    @property
    def kept_entries(self) -> int: ...
    @property
    def row_ptr(self) -> Tensor: ...
    @property
    def col_idx(self) -> Tensor: ...
    @property
    def row_idx(self) -> Tensor: ...
    @property
    def row_ptr_t(self) -> Tensor: ...
    @property
    def row_idx_t(self) -> Tensor: ...
    @property
    def perm_t(self) -> Tensor: ...
    @property
    def row_order(self) -> Tensor: ...
    @property
    def row_order_t(self) -> Tensor: ...


def check_shape(shape: Sequence[int], name: str, least: int) -> None:
    """Two integers of at least ``least``."""
    if len(shape) != 2 or not all(isinstance(n, int) and n >= least for n in shape):
        require(False, name, f"two integers >= {least}", tuple(shape))


def check_index(
    index: Tensor, name: str, size: int | None = None, device: torch.device | None = None
) -> None:
    """int32 ``[size]``, on ``device`` if one is given."""
    ok = isinstance(index, Tensor) and index.dtype == torch.int32 and index.dim() == 1
    if not ok or (size is not None and index.shape[0] != size):
        got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index)
        require(False, name, f"int32 [{'n' if size is None else size}]", got)
    if device is not None and index.device != device:
        require(False, name, f"a tensor on {device}", index.device)


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


def check_block_shapes(layout: Blocks) -> None:
    """The index tensors of blocks: int32, of sizes that agree, on one device."""
    n, device = layout.col_idx.shape[0], layout.col_idx.device
    rows, columns = layout.grid_shape
    check_shape(layout.block_shape, "block_shape", 1)
    for name in ("col_idx", "row_idx", "row_idx_t", "perm_t"):
        check_index(getattr(layout, name), name, n, device)
    for name, size in (
        ("row_ptr", rows + 1),
        ("row_ptr_t", columns + 1),
        ("row_order", rows),
        ("row_order_t", columns),
    ):
        check_index(getattr(layout, name), name, size, device)
    widths = (layout.out_width, layout.in_width)
    for name, lines, width, side in zip(
        ("row_ptr", "row_ptr_t"), (rows, columns), widths, layout.block_shape, strict=True
    ):
        want = -(-width // side) + 1
        require(lines + 1 == want, name, f"int32 [{want}], {width} features by {side}", lines + 1)


def check_blocks(layout: Blocks) -> None:
    """What the index tensors of blocks hold, if that can be read."""
    if not readable(layout.row_ptr):
        return
    ptr, col, row, ptr_t, row_t, perm, order, order_t = (
        getattr(layout, name).cpu().numpy().astype(np.int64)
        for name in (
            "row_ptr",
            "col_idx",
            "row_idx",
            "row_ptr_t",
            "row_idx_t",
            "perm_t",
            "row_order",
            "row_order_t",
        )
    )
    (rows, columns), n = layout.grid_shape, len(col)
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
        for side, features, lines in zip(
            layout.block_shape, (layout.out_width, layout.in_width), (rows, columns), strict=True
        )
    )
    entries = int((heights[row] * widths[col]).sum())
    require(layout.kept_entries == entries, "kept_entries", entries, layout.kept_entries)


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
