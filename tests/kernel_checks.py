"""One set of checks for the Triton kernels, run in the interpreter and on a GPU alike.

Each compares outputs and gradients with float64 and holds the error against PyTorch's in the same
dtype. Memory is poisoned by the suite, so what a kernel leaves unwritten fails.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.layouts import (
    BlockLayout,
    CompactLayout,
    Layout,
    full_weight,
    kept_values,
    layout_of,
    to_device,
)
from sensikernels.layouts.of_masks import block_layout
from sensikernels.masks.mask import Mask
from tests.tolerance import assert_close_to_reference

PATTERNS = ("random", "empty", "one", "full", "ragged", "one_row", "one_column")


def grid(pattern: str, rows: int, columns: int) -> Tensor:
    """A bool mask grid; ragged: row r keeps its first r blocks (the first row none)."""
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    if pattern == "random":
        kept = torch.rand(rows, columns) < 0.5
    elif pattern == "one":
        kept[rows // 2, columns - 1] = True
    elif pattern == "full":
        kept[:] = True
    elif pattern == "ragged":
        kept = torch.arange(columns) < torch.arange(rows)[:, None]
    elif pattern == "one_row":
        kept[rows - 1] = True
    elif pattern == "one_column":
        kept[:, columns // 2] = True
    return kept


def blocks(
    pattern: str,
    block: tuple[int, int],
    shape: tuple[int, int],
    device: str,
    *,
    compact: bool = False,
) -> BlockLayout:
    """A block layout of a named pattern."""
    rows, columns = (-(-n // b) for n, b in zip(shape, block, strict=True))
    kept = grid(pattern, rows, columns)
    if not compact:
        return blocks_of(kept, block, shape, device)
    layout = layout_of(kept, block, shape, compact_input=True, compact_output=True)
    assert isinstance(layout, BlockLayout)
    return to_device(layout, device)


def blocks_of(
    kept: Tensor, block: tuple[int, int], shape: tuple[int, int], device: str
) -> BlockLayout:
    """A block layout even where the grid would also pack."""
    flags = {"compact_input": False, "compact_output": False}
    layout = block_layout(kept, kept, block, shape, None, None, **flags)
    return to_device(layout, device)


def compact(pattern: str, shape: tuple[int, int], device: str, **compact: bool) -> Layout:
    """Rows, columns or heads of a weight."""
    out_features, in_features = shape
    if pattern == "rows":
        mask = Mask.rows(torch.rand(out_features) < 0.4, shape)
    elif pattern == "columns":
        mask = Mask.columns(torch.rand(in_features) < 0.4, shape)
    elif pattern == "heads":
        mask = Mask.heads(torch.arange(out_features // 16) % 3 == 1, shape, head_dim=16)
    elif pattern == "one":
        mask = Mask.rows(torch.arange(out_features) == out_features // 3, shape)
    elif pattern == "none":
        mask = Mask.rows(torch.zeros(out_features, dtype=torch.bool), shape)
    elif pattern == "all":
        mask = Mask.rows(torch.ones(out_features, dtype=torch.bool), shape)
    else:
        raise ValueError(pattern)
    return to_device(layout_of(mask.grid, mask.block_shape, shape, **compact), device)


def strided(x: Tensor, how: str) -> Tensor:
    """``x`` with other strides: rows apart, columns apart, or transposed in memory."""
    if how == "sliced":
        wide = torch.full((x.shape[0], x.shape[1] + 24), float("nan"), dtype=x.dtype)
        wide = wide.to(x.device)
        wide[:, 8 : 8 + x.shape[1]] = x
        return wide[:, 8 : 8 + x.shape[1]]
    if how == "transposed":
        return x.t().contiguous().t()
    return x


def narrow(weight: Tensor, layout: Layout) -> Tensor:
    """The kept entries of the weight that the layer multiplies by, ``[out_width, in_width]``."""
    if isinstance(layout, BlockLayout):
        return kept_values(weight, layout, compact=True)
    assert isinstance(layout, CompactLayout)
    for axis, index in enumerate((layout.scatter_rows, layout.gather_columns)):
        weight = weight if index is None else weight.index_select(axis, index)
    return weight


def check_masked_linear(
    layout: Layout,
    *,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    activation: str = "none",
    bias: bool = True,
    strides: str = "contiguous",
) -> None:
    """Forward, pre-activation, input gradient, gradient of the kept entries."""
    from sensikernels.ops.masked_linear import triton as kernels

    x = torch.randn(tokens, layout.in_width).to(dtype).to(device)
    values = (
        kept_values(torch.randn(layout.shape).to(device), layout).to(dtype) / layout.in_width**0.5
    )
    b = torch.randn(layout.out_width).to(dtype).to(device) if bias else None
    dy = torch.randn(tokens, layout.out_width).to(dtype).to(device)

    def truth(kind: torch.dtype) -> list[Tensor]:
        w, x_, dy_ = full_weight(values.to(kind), layout, compact=True), x.to(kind), dy.to(kind)
        pre = F.linear(x_, w, None if b is None else b.to(kind))
        grads = [dy_ @ w, narrow(dy_.T @ x_, layout)]
        return [F.gelu(pre) if activation == "gelu" else pre, pre, *grads]

    read, grad = strided(x, strides), strided(dy, strides)
    y, pre = kernels.masked_linear_forward(read, values, layout, b, activation)
    assert (pre is None) == (activation == "none")
    got = [
        y,
        y if pre is None else pre,
        kernels.masked_linear_grad_input(grad, values, layout),
        kernels.masked_linear_grad_values(grad, read, layout),
    ]
    for mine, same, exact in zip(got, truth(dtype), truth(torch.float64), strict=True):
        assert_close_to_reference(mine, same, exact)


def check_grad_values(
    sharing: list[Layout], *, tokens: int, dtype: torch.dtype, device: str, saved: bool
) -> None:
    """Gradients of the kept entries of linears that share x, alone and grouped."""
    from sensikernels.ops.selective_linear import triton as kernels

    x = torch.randn(tokens, sharing[0].shape[1]).to(dtype).to(device)
    dys = [torch.randn(tokens, one.shape[0]).to(dtype).to(device) for one in sharing]

    def truth(kind: torch.dtype) -> list[Tensor]:
        pairs = zip(dys, sharing, strict=True)
        return [kept_values(dy.to(kind).T @ x.to(kind), one) for dy, one in pairs]

    read = kernels.selective_save(x, sharing[0]) if saved else x
    if read is None:
        assert sharing[0].kept_entries == 0
        read = x
    grouped = kernels.selective_grad_values_grouped(dys, read, sharing)
    alone = [
        kernels.selective_grad_values(dy, read, one) for dy, one in zip(dys, sharing, strict=True)
    ]
    for got in (grouped, alone):
        for mine, same, exact in zip(got, truth(dtype), truth(torch.float64), strict=True):
            assert_close_to_reference(mine, same, exact)


def check_backward_activation(
    tokens: int, width: int, *, dtype: torch.dtype, device: str, strides: str = "contiguous"
) -> None:
    """dY through gelu' and the bias gradient; without activation the bias gradient alone."""
    from sensikernels.ops.masked_linear import triton as kernels

    pre = (3 * torch.randn(tokens, width)).to(dtype).to(device)
    dy = torch.randn(tokens, width).to(dtype).to(device)

    def truth(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        dpre = torch.ops.aten.gelu_backward(dy.to(kind), pre.to(kind))
        return dpre, dpre.sum(0)

    got = kernels.masked_linear_backward_activation(strided(dy, strides), strided(pre, strides))
    for mine, same, exact in zip(got, truth(dtype), truth(torch.float64), strict=True):
        assert_close_to_reference(mine, same, exact)
    same_dy, total = kernels.masked_linear_backward_activation(strided(dy, strides), None)
    assert torch.equal(same_dy, dy)
    assert_close_to_reference(total, dy.sum(0), dy.double().sum(0))


def check_bitwise_repeatable(run: Callable[[], list[Tensor]]) -> None:
    """The same bits on every run."""
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
