"""Launchers of the selective linear's backward: gradients of the kept entries only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.layouts import BlockLayout, CompactLayout, Layout
from sensikernels.ops.common.triton_gather import MOST_READ, gather_columns
from sensikernels.ops.common.triton_gelu import column_sum
from sensikernels.ops.common.triton_launch import INTERPRET, NAMES
from sensikernels.ops.common.triton_sdd import MOST, block_gradients
from sensikernels.ops.selective_linear.triton_rows import row_gradient

__all__ = [
    "selective_backward_activation",
    "selective_grad_values",
    "selective_grad_values_grouped",
    "selective_save",
]


def selective_save(x: Tensor, layout: CompactLayout | BlockLayout) -> Tensor | None:
    """The part of ``x [T, in]`` that the backward needs: kept columns; None if no entry is kept."""
    if layout.kept_entries == 0:
        return None
    columns = layout.columns
    return x if columns is None or x.shape[1] == columns.shape[0] else _pack(x, columns)


def selective_grad_values(dy: Tensor, x: Tensor, layout: CompactLayout | BlockLayout) -> Tensor:
    """``dY^T @ x`` at the kept entries, in ``layout.values_shape``.

    ``dy`` is ``[T, out_features]`` or only the kept rows' columns of it; ``x`` is
    ``[T, in_features]`` or what ``selective_save`` kept of it.
    """
    return selective_grad_values_grouped([dy], x, [layout])[0]


def selective_grad_values_grouped(
    dys: Sequence[Tensor], x: Tensor, layouts: Sequence[CompactLayout | BlockLayout]
) -> list[Tensor]:
    """``selective_grad_values`` of up to three linears that read the same x, in one product.

    All layouts are blocks of one shape, or all are compact with the same columns (q, k, v: whole
    rows). The gradients are views of one arena.

    Raises:
        UsageError: the layouts do not share a product, or the device or dtype is not served.
    """
    _check(dys, x, layouts)
    if isinstance(layouts[0], BlockLayout):
        columns = layouts[0].columns
        return block_gradients(
            _narrow(x, columns),
            [_narrow(dy, layout.rows) for dy, layout in zip(dys, layouts, strict=True)],
            layouts,
        )
    counts = [layout.values_shape[0] for layout in layouts]
    rows = [
        None if layout.rows is None or dy.shape[1] == layout.rows.shape[0] else layout.rows
        for dy, layout in zip(dys, layouts, strict=True)
    ]
    if len(dys) == 1 and rows[0] is None:
        compact = dys[0]
    else:
        compact = gather_columns(dys, rows)
    return list(row_gradient(compact, _narrow(x, layouts[0].columns)).split(counts))


def selective_backward_activation(
    dy: Tensor, preactivation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(dpre, grad_bias)``: dY through gelu' and its sum over tokens, one pass over dY."""
    return column_sum(dy, preactivation)


def _pack(matrix: Tensor, columns: Tensor) -> Tensor:
    return gather_columns([matrix], [columns])


def _narrow(matrix: Tensor, columns: Tensor | None) -> Tensor:
    if columns is None or matrix.shape[1] == columns.shape[0]:
        return matrix
    return _pack(matrix, columns)


def _check(dys: Sequence[Tensor], x: Tensor, layouts: Sequence[Layout]) -> None:
    kinds = sorted({type(layout).__name__ for layout in layouts})
    require(
        kinds in (["BlockLayout"], ["CompactLayout"]), "layouts", "all compact or all blocks", kinds
    )
    most = min(MOST, MOST_READ)
    require(1 <= len(dys) == len(layouts) <= most, "dys", f"1 to {most}, one a layout", len(dys))
    first = layouts[0]
    for layout in layouts[1:]:
        same = layout.columns is first.columns or (
            layout.columns is not None
            and first.columns is not None
            and layout.columns.equal(first.columns)
        )
        require(same, "layouts", "the same kept columns, to share one x", "different ones")
        if isinstance(layout, BlockLayout):
            shapes = [layout.block_shape, first.block_shape]
            require(shapes[0] == shapes[1], "layouts", "blocks of one shape", shapes)
    require(x.dtype in NAMES, "x", f"one of {', '.join(map(str, NAMES))} for triton", x.dtype)
    require(x.is_cuda or INTERPRET, "x", "a tensor on a GPU for backend triton", x.device)
