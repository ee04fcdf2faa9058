"""Launchers of the masked linear: forward, input gradient, gradient of the kept entries.

Activations are matrices ``[T, features]``; any row stride is read as it is. Products of compact
layers that nothing is gathered for or scattered from go to cuBLAS.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.layouts import BlockLayout, CompactLayout, Layout
from sensikernels.ops.common.triton_gather import gather_columns
from sensikernels.ops.common.triton_gelu import column_sum
from sensikernels.ops.common.triton_launch import INTERPRET, NAMES
from sensikernels.ops.common.triton_sdd import block_gradients
from sensikernels.ops.masked_linear.triton_blocks import block_linear
from sensikernels.ops.masked_linear.triton_compact import compact_linear

__all__ = [
    "masked_linear_backward_activation",
    "masked_linear_forward",
    "masked_linear_grad_input",
    "masked_linear_grad_values",
]


def masked_linear_forward(
    x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """``(act(x @ W^T + bias), pre-activation)``, ``[T, out_width]``; None without activation.

    Raises:
        UsageError: the layout is by element, the dtype is not one of ``NAMES``, or x is neither on
            a GPU nor interpreted.
    """
    _check(x, layout)
    gelu = activation == "gelu"
    if isinstance(layout, BlockLayout):
        return block_linear(x, values, layout, bias, gelu=gelu)
    read = _read(x, layout.gather_columns)
    if layout.scatter_rows is None and not gelu:
        return F.linear(read, values, bias), None
    return compact_linear(
        read, values, bias, layout.out_width, scatter=layout.scatter_rows, gelu=gelu
    )


def masked_linear_grad_input(dy: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """``dY @ W``, ``[T, in_width]``: zero in columns that the layer does not read."""
    _check(dy, layout)
    if isinstance(layout, BlockLayout):
        return block_linear(dy, values, layout, transposed=True)[0]
    read = _read(dy, layout.scatter_rows)
    if layout.gather_columns is None:
        return read @ values
    return compact_linear(
        read, values, None, layout.in_width, scatter=layout.gather_columns, inner_first=True
    )[0]


def masked_linear_grad_values(dy: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """``dY^T @ x`` at the kept entries, in ``layout.values_shape``."""
    _check(dy, layout)
    if isinstance(layout, BlockLayout):
        return block_gradients(x, [dy], [layout])[0]
    return _read(dy, layout.scatter_rows).T @ _read(x, layout.gather_columns)


def masked_linear_backward_activation(
    dy: Tensor, preactivation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(dpre, grad_bias)``: dY through gelu' and its sum over tokens, one pass over dY.

    Without a pre-activation ``dpre`` is dY itself.
    """
    _check(dy, None)
    return column_sum(dy, preactivation)


def _read(matrix: Tensor, columns: Tensor | None) -> Tensor:
    return matrix if columns is None else gather_columns([matrix], [columns])


def _check(x: Tensor, layout: Layout | None) -> None:
    ok = layout is None or isinstance(layout, (CompactLayout, BlockLayout))
    require(ok, "layout", "compact or blocks for backend triton", type(layout).__name__)
    require(x.dtype in NAMES, "x", f"one of {', '.join(map(str, NAMES))} for triton", x.dtype)
    require(x.is_cuda or INTERPRET, "x", "a tensor on a GPU for backend triton", x.device)
