"""Checks of a selective linear's arguments, for the public function and its operators."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sensikernels._core.checks import expected, require
from sensikernels._core.values import readable
from sensikernels.layouts import BlockLayout, Layout
from sensikernels.ops.common.carried import Carried, carried
from sensikernels.ops.common.checks import check_kernels, check_layout, check_rank, check_tensor
from sensikernels.ops.common.linears import ACTIVATIONS, check_operands

__all__ = ["ACTIVATIONS", "alone", "apart", "check"]


def check(
    x: Tensor, weight: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, activation: str
) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if weight.shape != layout.shape:
        raise expected("weight", list(layout.shape), list(weight.shape))
    if x.device != weight.device:
        raise expected("x", f"a tensor on {weight.device}", x.device)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise expected("x", f"dtype {weight.dtype} as weight", x.dtype)
    out_features, in_features = layout.shape
    check_operands(x, values, layout, bias, activation, in_features, out_features)


def apart(
    dys: Sequence[Tensor], x: Tensor, sizes: Sequence[int], index: Sequence[Tensor], backend: str
) -> list[Carried]:
    """The checked layouts that ``grouped_through_dispatcher`` wrote one after the other."""
    check_kernels(backend, x)
    check_rank(x, "x", 2)
    n, each = len(dys), len(sizes) // max(len(dys), 1)
    require(n > 0, "dys", "at least one", 0)
    ok = len(sizes) == n * each and each in (7, 9)
    require(ok, "sizes", f"7 or 9 for each of {n} layouts", len(sizes))
    mine = [sizes[i * each : (i + 1) * each] for i in range(n)]
    counts = [sum(one[5:7]) + (8 if each > 7 else 0) for one in mine]
    ends = list(accumulate(counts, initial=0))
    require(min(counts) >= 0 and ends[-1] == len(index), "index", ends[-1], len(index))
    layouts = [carried(one, index[a:b]) for one, (a, b) in zip(mine, pairwise(ends), strict=True)]
    first = layouts[0]
    for layout, dy in zip(layouts, dys, strict=True):
        check_layout(layout, x)
        _check_operands(dy, x, layout, backend)
        alike = layout.columns is first.columns or _same_columns(layout, first)
        require(alike, "index", "the same kept columns for all", "others")
        if isinstance(layout, BlockLayout) and isinstance(first, BlockLayout):
            shapes = layout.block_shape, first.block_shape
            require(shapes[0] == shapes[1], "sizes", f"blocks of {shapes[1]}", shapes[0])
    return layouts


def alone(
    dy: Tensor, x: Tensor, sizes: Sequence[int], index: Sequence[Tensor], backend: str
) -> Carried:
    """The checked layout of one linear, whose gradient a kernel of its own forms."""
    (layout,) = apart([dy], x, sizes, index, backend)
    if backend == "native" and not isinstance(layout, BlockLayout):
        raise expected("backend", "triton for this layout", backend)
    return layout


def _same_columns(a: Carried, b: Carried) -> bool:
    """Whether x, read for one, is read for the other; by size where values cannot be read."""
    if a.columns is None or b.columns is None or a.columns.shape != b.columns.shape:
        return False
    return not readable(a.columns) or torch.equal(a.columns, b.columns)


def _check_operands(dy: Tensor, x: Tensor, layout: Carried, backend: str) -> None:
    """Both hold the kept features alone or, where kernels choose them themselves, all."""
    ends = zip((dy, x), ("dy", "x"), (layout.rows, layout.columns), layout.shape, strict=True)
    for t, name, index, features in ends:
        check_rank(t, name, 2)
        widths = [features if index is None else index.shape[0]]
        if backend == "triton":
            widths.append(features)
        if t.shape[1] not in widths:
            raise expected(name, f"[T, {widths[0]}]", list(t.shape))
    check_tensor(dy, "dy", (x.shape[0], dy.shape[1]), x.dtype, x.device)
