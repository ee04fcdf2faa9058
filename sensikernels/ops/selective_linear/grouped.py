"""Selective linears that read the same input: one node, one product for all kept entries.

Query, key and value of an attention do. Saved of the input: one copy of what all of them read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels._core import environment
from sensikernels._core.checks import require
from sensikernels.layouts import BlockLayout, CompactLayout, ElementLayout, Layout
from sensikernels.ops.common.columns import fused_activation, gather, matrix, unwatched
from sensikernels.ops.selective_linear import ops
from sensikernels.ops.selective_linear.checks import check

MOST = 3  # what one launch of the Triton kernels takes


class Selected(NamedTuple):
    """The arguments of ``selective_linear`` that belong to one linear."""

    weight: Tensor
    values: Tensor
    layout: Layout
    bias: Tensor | None = None


def why_apart(layouts: Sequence[Layout], dtype: torch.dtype) -> str | None:
    """Why linears with these layouts cannot share a product; None if they can."""
    first, *others = layouts
    if isinstance(first, ElementLayout) or any(type(one) is not type(first) for one in others):
        return "a product is shared by compact layouts or by blocks, not by elements or a mixture"
    if len(layouts) > MOST:
        return f"at most {MOST} linears share a product, got {len(layouts)}"
    joinable = isinstance(first, BlockLayout) and not torch.compiler.is_compiling()
    for other in others:
        if not joinable and not _same(first.columns, other.columns):
            return "they keep different columns"
        if isinstance(first, BlockLayout) and other.block_shape != first.block_shape:  # type: ignore[union-attr]
            return "their blocks differ in shape"
    if dtype == torch.float64 and isinstance(first, BlockLayout):
        return "blocks of float64 run alone"
    return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or torch.compiler.is_compiling():
        return a is b  # a graph cannot depend on what an index holds
    return a is b or torch.equal(a, b)


def joined(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """The layouts over the columns that any of them keeps; themselves where they keep the same.

    Blocks alone need it; it is done once for the layouts that meet, and kept with the first.
    """
    first = layouts[0]
    if not isinstance(first, BlockLayout) or all(one.columns is first.columns for one in layouts):
        return tuple(layouts)
    known, made = first.chosen.get("joined", ((), ()))
    if len(known) != len(layouts) or any(a is not b for a, b in zip(known, layouts, strict=True)):
        known, made = tuple(layouts), tuple(_join([_blocks(one) for one in layouts]))
        first.chosen["joined"] = known, made
    return cast("tuple[Layout, ...]", made)


def _join(layouts: Sequence[BlockLayout]) -> list[BlockLayout]:
    width, features = layouts[0].block_shape[1], layouts[0].shape[1]
    device = layouts[0].col_idx.device
    grid = -(-features // width)
    kept = torch.zeros(grid, dtype=torch.bool, device=device)
    own = []  # the block columns that each sees, of all
    for one in layouts:
        mine = one.columns
        seen = torch.arange(grid, device=device) if mine is None else mine[::width] // width
        own.append(seen)
        kept[seen] = True
    if bool(kept.all()):
        columns, place = None, torch.arange(grid, device=device)
    else:
        columns = kept.repeat_interleave(width)[:features].nonzero().flatten().int()
        place = kept.cumsum(0) - 1
    across = int(kept.sum())
    return [
        _over(one, columns, place[seen[one.col_idx]], across)
        for one, seen in zip(layouts, own, strict=True)
    ]


def _over(layout: BlockLayout, columns: Tensor | None, index: Tensor, across: int) -> BlockLayout:
    """``layout`` on a grid ``across`` blocks wide, of the features ``columns``."""
    counts = torch.bincount(index, minlength=across)
    return replace(
        layout,
        columns=columns,
        col_idx=index.int(),
        row_ptr_t=F.pad(counts.cumsum(0), (1, 0)).int(),
        row_order_t=counts.argsort(descending=True, stable=True).int(),
    )


def _blocks(layout: Layout) -> BlockLayout:
    assert isinstance(layout, BlockLayout)
    return layout


def selective_linear_grouped(
    x: Tensor, linears: Sequence[Selected], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """``selective_linear`` of every one of ``linears`` on the same ``x``, without activation.

    The forward is one dense GEMM each. In backward the gradients of all kept entries are one
    product, ``[dy_1[:, rows_1] | dy_2[:, rows_2] | ...]^T x``, and the gradients of x are summed
    by the GEMMs that make them. x is read, and saved, once.

    Args:
        x: ``[..., in_features]``.
        linears: one to three, all compact with the same kept columns, or all of blocks of one shape
            (of x the columns that any of them keeps are saved); every ``values`` is trained.
        backend: ``auto``, ``native`` or ``triton``.

    Returns:
        ``[..., out_features]`` of each, as ``selective_linear`` returns it.

    Raises:
        UsageError: as ``selective_linear``, or the linears cannot share a product.
    """
    layouts = [one.layout for one in linears]
    reason = why_apart(layouts, x.dtype) if linears else "there are none"
    require(reason is None, "linears", "ones that can share a product", reason)
    for one in linears:
        check(x, one.weight, one.values, one.layout, one.bias, "none")
        require(one.values.requires_grad, "values", "ones that are trained", "a frozen one")
    served = _backend(layouts[0], x, environment.backend() if backend == "auto" else backend)
    tensors = [t for one in linears for t in (one.weight.detach(), one.values, one.bias)]
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, tensors = x.to(dtype), [None if t is None else t.to(dtype) for t in tensors]
        with torch.autocast(device, enabled=False):
            return _Grouped.apply(x, joined(layouts), served, *tensors)  # type: ignore[no-untyped-call]
    return _Grouped.apply(x, joined(layouts), served, *tensors)  # type: ignore[no-untyped-call]


def _backend(layout: Layout, x: Tensor, asked: str) -> str:
    if asked == "triton":
        ok = x.is_cuda or environment.interpreting()
        require(ok, "backend", "a CUDA tensor for triton", f"triton with x on {x.device}")
    require(asked in ("auto", "native", "triton"), "backend", "auto, native or triton", asked)
    if asked == "triton" or (asked == "auto" and fused_activation(x)):
        return "triton"
    require(not x.is_cuda or isinstance(layout, CompactLayout), "backend", "triton", asked)
    return "native"


class _Grouped(torch.autograd.Function):
    """``tensors``: weight, values and bias of each linear in turn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layouts: tuple[Any, ...], backend: str, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        x2d, weights, biases = matrix(x), tensors[::3], tensors[2::3]
        ctx.shape, ctx.layouts, ctx.backend = x.shape, layouts, backend
        kept = weights if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(gather(x2d, layouts[0].columns), *kept)
        return tuple(
            F.linear(x2d, weight, bias).view(*x.shape[:-1], weight.shape[0])
            for weight, bias in zip(weights, biases, strict=True)
            if weight is not None
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read, *weights = ctx.saved_tensors
        dys = [matrix(grad) for grad in grads]
        dx = None
        for dy, weight in zip(dys, weights, strict=False):
            dx = dy @ weight if dx is None else torch.addmm(dx, dy, weight)
        narrow = dys  # the Triton kernels choose their rows themselves
        if ctx.backend == "native":
            narrow = [gather(dy, layout.rows) for dy, layout in zip(dys, ctx.layouts, strict=True)]
        if unwatched(read):
            dvalues = ops.grad_values_grouped(narrow, read, ctx.layouts, ctx.backend)
        else:
            dvalues = ops.grouped_through_dispatcher(narrow, read, ctx.layouts, ctx.backend)
        needed = ctx.needs_input_grad[5::3]
        rest: list[Tensor | None] = []
        for dy, mine, bias_needed in zip(dys, dvalues, needed, strict=True):
            rest += [None, mine, dy.sum(0) if bias_needed else None]
        return (None if dx is None else dx.view(ctx.shape)), None, None, *rest
