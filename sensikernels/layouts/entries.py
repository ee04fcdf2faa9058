"""The kept entries of a weight, taken out of it and put back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.layouts.kinds import BlockLayout, CompactLayout, ElementLayout, Layout


def kept_values(weight: Tensor, layout: Layout, *, compact: bool = False) -> Tensor:
    """The kept entries of ``weight [out_features, in_features]``, shaped ``values_shape``.

    ``compact``: ``weight`` has only the features of ``layout.rows`` and ``layout.columns``.
    Returns ``weight`` itself when a compact layout keeps all of it. Differentiable. Raises
    UsageError for a weight of another shape.
    """
    layout.check()
    ends = (layout.rows, layout.columns) if compact else (None, None)
    shape = [n if i is None else len(i) for i, n in zip(ends, layout.shape, strict=True)]
    require(list(weight.shape) == shape, "weight", shape, list(weight.shape))
    if isinstance(layout, ElementLayout):
        return weight.flatten().index_select(0, layout.index)
    kept = weight if compact else _take(_take(weight, 0, layout.rows), 1, layout.columns)
    if isinstance(layout, CompactLayout):
        return kept
    (n_rows, n_columns), (height, width) = layout.grid_shape, layout.block_shape
    padding = (0, n_columns * width - kept.shape[1], 0, n_rows * height - kept.shape[0])
    tiles = F.pad(kept, padding).reshape(n_rows, height, n_columns, width)
    return tiles[layout.row_idx, :, layout.col_idx]


def full_weight(values: Tensor, layout: Layout, *, compact: bool = False) -> Tensor:
    """The weight ``[out_features, in_features]`` with ``values`` kept and zeros elsewhere.

    With ``compact`` the weight the layer multiplies by: ``[out_width, in_width]``. Differentiable;
    returns ``values`` itself when they are that weight. Raises UsageError for other values.
    """
    layout.check()
    ok = tuple(values.shape) == layout.values_shape
    require(ok, "values", list(layout.values_shape), list(values.shape))
    if isinstance(layout, ElementLayout):
        flat = values.new_zeros(layout.shape[0] * layout.shape[1])
        return flat.index_copy(0, layout.index.long(), values).view(layout.shape)
    matrix = values if isinstance(layout, CompactLayout) else _untile(values, layout)
    if not (compact and layout.compact_input):
        matrix = _put(matrix, 1, layout.columns, layout.shape[1])
    if not (compact and layout.compact_output):
        matrix = _put(matrix, 0, layout.rows, layout.shape[0])
    return matrix


def assign_(weight: Tensor, values: Tensor, layout: Layout) -> None:
    """Write ``values`` over the kept entries of ``weight [out_features, in_features]`` in place.

    Raises UsageError for values or a weight of another shape.
    """
    layout.check()
    require(tuple(weight.shape) == layout.shape, "weight", layout.shape, tuple(weight.shape))
    ok = tuple(values.shape) == layout.values_shape
    require(ok, "values", list(layout.values_shape), list(values.shape))
    if isinstance(layout, ElementLayout) and weight.is_contiguous():
        weight.view(-1).index_copy_(0, layout.index.long(), values)
    elif isinstance(layout, ElementLayout):
        index, width = layout.index.long(), layout.shape[1]
        weight.index_put_((index // width, index % width), values)
    elif isinstance(layout, BlockLayout):
        kept = full_weight(torch.ones_like(values), layout).bool()
        weight.copy_(torch.where(kept, full_weight(values, layout), weight))
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


def _take(matrix: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return matrix if index is None else matrix.index_select(axis, index)


def _put(matrix: Tensor, axis: int, index: Tensor | None, size: int) -> Tensor:
    if index is None:
        return matrix
    shape = [size, matrix.shape[1]] if axis == 0 else [matrix.shape[0], size]
    return matrix.new_zeros(shape).index_copy(axis, index.long(), matrix)
