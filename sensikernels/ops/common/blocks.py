"""Products of a block-sparse weight on the CPU: forward, input gradient, gradient of the blocks.

The compiled extension reads the activations in place (fp32 and bf16 on AVX-512). Everything else
runs as one GEMM per block row on a compact strip of the activations: any float dtype, any block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core import extension
from sensikernels.layouts import BlockLayout
from sensikernels.ops.common.columns import launcher


@cache
def _native_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the extension's kernels take on this processor."""
    if not extension.available():
        return ()
    level = extension.ops().block_isa()
    return (torch.float32, torch.bfloat16)[:level]


def uses_native(dtype: torch.dtype) -> bool:
    """True if the extension serves this dtype on this processor."""
    return dtype in _native_dtypes()


def forward(x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None) -> Tensor:
    """``x [T, in_width]`` times the transposed weight, plus bias: ``[T, out_width]``."""
    if uses_native(x.dtype):
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        index = layout.row_ptr, layout.col_idx
        run = launcher("block_forward")
        return run(x.contiguous(), values.contiguous(), *index, bias, layout.out_width)
    height = layout.block_shape[0]
    strips = _tiles(x, layout.grid_shape[1], layout.block_shape[1])
    y = x.new_empty((x.shape[0], layout.grid_shape[0] * height))
    for row, (low, high) in enumerate(_spans(layout.row_ptr)):
        strip = strips.index_select(1, layout.col_idx[low:high]).flatten(1)
        weight = values[low:high].transpose(0, 1).reshape(height, -1)
        y[:, row * height : (row + 1) * height] = strip @ weight.T
    y = y[:, : layout.out_width]
    return y.contiguous() if bias is None else y + bias


def grad_input(dy: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """``dy [T, out_width]`` times the weight: ``[T, in_width]``."""
    if uses_native(dy.dtype):
        index = layout.row_ptr_t, layout.row_idx_t, layout.perm_t
        run = launcher("block_grad_input")
        return run(dy.contiguous(), values.contiguous(), *index, layout.in_width)
    width = layout.block_shape[1]
    strips = _tiles(dy, layout.grid_shape[0], layout.block_shape[0])
    dx = dy.new_empty((dy.shape[0], layout.grid_shape[1] * width))
    for column, (low, high) in enumerate(_spans(layout.row_ptr_t)):
        strip = strips.index_select(1, layout.row_idx_t[low:high]).flatten(1)
        weight = values.index_select(0, layout.perm_t[low:high]).reshape(-1, width)
        dx[:, column * width : (column + 1) * width] = strip @ weight
    return dx[:, : layout.in_width].contiguous()


def grad_values(dy: Tensor, x: Tensor, layout: BlockLayout) -> Tensor:
    """The kept blocks of ``dy^T @ x``, padding zero: ``[n_blocks, bm, bn]``."""
    return grad_values_grouped([dy], x, [layout])[0]


def grad_values_grouped(
    dys: Sequence[Tensor], x: Tensor, layouts: Sequence[BlockLayout]
) -> list[Tensor]:
    """``grad_values`` of linears with blocks of one shape that read the same ``x``."""
    if uses_native(x.dtype):
        together = launcher("block_grad_values")(
            [dy.contiguous() for dy in dys],
            x.contiguous(),
            [one.row_idx for one in layouts],
            [one.col_idx for one in layouts],
            *layouts[0].block_shape,
        )
        return [together] if len(dys) == 1 else list(together.split([i.n_blocks for i in layouts]))
    return [_by_rows(dy, x, layout) for dy, layout in zip(dys, layouts, strict=True)]


def _by_rows(dy: Tensor, x: Tensor, layout: BlockLayout) -> Tensor:
    height, width = layout.block_shape
    strips = _tiles(x, layout.grid_shape[1], width)
    rows = _tiles(dy, layout.grid_shape[0], height)
    grads = dy.new_empty(layout.values_shape)
    for row, (low, high) in enumerate(_spans(layout.row_ptr)):
        strip = strips.index_select(1, layout.col_idx[low:high]).flatten(1)
        product = rows[:, row].T @ strip
        grads[low:high] = product.view(height, high - low, width).transpose(0, 1)
    return grads


def _tiles(matrix: Tensor, n: int, size: int) -> Tensor:
    """``[T, n, size]``, zero beyond the edge."""
    return F.pad(matrix, (0, n * size - matrix.shape[1])).view(matrix.shape[0], n, size)


def _spans(pointers: Tensor) -> list[tuple[int, int]]:
    bounds: list[int] = pointers.tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))
