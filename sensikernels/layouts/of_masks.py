"""The layout of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.layouts import checks
from sensikernels.layouts.kinds import BlockLayout, CompactLayout, ElementLayout, Layout, mark_sound


def layout_of(
    grid: Tensor,
    block_shape: tuple[int, int],
    shape: tuple[int, int],
    *,
    compact_input: bool = False,
    compact_output: bool = False,
) -> Layout:
    """The cheapest layout of a mask ``grid`` (bool ``[R, C]``) over tiles of ``block_shape``.

    Compact where the grid is an outer product of kept rows and kept columns, elements for
    ``(1, 1)`` tiles, blocks otherwise. The last tile of a row or column may be cut by the edge.

    Raises:
        UsageError: the grid is not a bool matrix of that size; elements asked to be compact.
    """
    checks.check_shape(shape, "shape", 0)
    checks.check_shape(block_shape, "block_shape", 1)
    expected = [-(-n // b) for n, b in zip(shape, block_shape, strict=True)]
    require(grid.dtype == torch.bool, "grid", "dtype torch.bool", grid.dtype)
    require(list(grid.shape) == expected, "grid", f"shape {expected}", list(grid.shape))
    kept_rows, kept_columns = grid.any(1), grid.any(0)
    ends = {"compact_input": compact_input, "compact_output": compact_output}
    if grid.shape[0] == 1:
        kept_rows = torch.ones_like(kept_rows)
    elif grid.shape[1] == 1:
        kept_columns = torch.ones_like(kept_columns)
    if torch.equal(grid, kept_rows[:, None] & kept_columns):
        layout = CompactLayout(
            shape=shape,
            rows=_features(kept_rows, block_shape[0], shape[0]),
            columns=_features(kept_columns, block_shape[1], shape[1]),
            **ends,
        )
        return mark_sound(layout)
    if block_shape == (1, 1):
        require(not (compact_input or compact_output), "compact", "False for elements", "True")
        return mark_sound(ElementLayout(shape=shape, index=_indices(grid.flatten())))
    rows = _features(kept_rows, block_shape[0], shape[0]) if compact_output else None
    columns = _features(kept_columns, block_shape[1], shape[1]) if compact_input else None
    seen = grid if rows is None else grid[kept_rows]
    seen = seen if columns is None else seen[:, kept_columns]
    return block_layout(grid, seen, block_shape, shape, rows, columns, **ends)


def block_layout(
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
    """The blocks of ``seen``: what is left of ``grid`` when features of no block are gone."""
    row_idx, col_idx = seen.nonzero().unbind(1)
    perm_t = torch.argsort(col_idx, stable=True)
    per_row, per_column = seen.sum(1), seen.sum(0)
    heights, widths = (
        torch.arange(n, device=grid.device).mul(-b).add(size).clamp(max=b)
        for n, b, size in zip(grid.shape, block_shape, shape, strict=True)
    )
    layout = BlockLayout(
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
    return mark_sound(layout)


def _indices(kept: Tensor) -> Tensor:
    return kept.nonzero().flatten().int()


def _pointers(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _features(kept: Tensor, band: int, features: int) -> Tensor | None:
    """Kept features of kept bands; None when all are kept."""
    if bool(kept.all()):
        return None
    return _indices(kept.repeat_interleave(band)[:features])
