"""Selective linears that read the same input: one node, one product for all kept entries.

Query, key and value of an attention do. One copy of what all of them read is saved of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sensikernels._core import environment
from sensikernels._core.checks import require
from sensikernels._core.compile import constant_when_traced
from sensikernels.layouts import BlockLayout, ElementLayout, Layout
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.common.columns import fused_activation, gather, matrix, unwatched
from sensikernels.ops.common.linears import autocast_dtype
from sensikernels.ops.selective_linear import ops
from sensikernels.ops.selective_linear.checks import check

MOST = 3  # what one launch of the Triton kernels takes


class Selected(NamedTuple):
    """The arguments of ``selective_linear`` that belong to one linear."""

    weight: Tensor
    values: Tensor
    layout: Layout
    bias: Tensor | None = None


class _Met(NamedTuple):
    """Verdict over layouts that met last: derived from them, and kept no longer than the first."""

    others: tuple[ref[Layout], ...]
    reason: str | None
    over: tuple[Layout, ...]


_MET: WeakKeyDictionary[Layout, _Met] = WeakKeyDictionary()


def _met(layouts: Sequence[Layout]) -> _Met:
    first, *others = layouts
    known = _MET.get(first)
    if known is None or [one() for one in known.others] != others:
        reason, over = _apart(layouts), tuple[Layout, ...]()
        if reason is None and not _ready(layouts):
            over = tuple(_join([_blocks(one) for one in layouts]))
        known = _MET[first] = _Met(tuple(map(ref, others)), reason, over)
    return known


def why_apart(layouts: Sequence[Layout], dtype: torch.dtype) -> str | None:
    """The reason for which linears of these layouts cannot share a product; None if they can."""
    reason = _apart(layouts) if torch.compiler.is_compiling() else _met(layouts).reason
    if reason is None and dtype == torch.float64 and isinstance(layouts[0], BlockLayout):
        return "blocks of float64 run alone"
    return reason


def _apart(layouts: Sequence[Layout]) -> str | None:
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
    return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or torch.compiler.is_compiling():
        return a is b  # a graph cannot depend on what an index holds
    return a is b or torch.equal(a, b)


def joined(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """The layouts over the columns that any of them keeps; themselves where they keep the same.

    Only blocks need it. The result is kept while the first of them lives.
    """
    return tuple(layouts) if _ready(layouts) else _met(layouts).over


def _ready(layouts: Sequence[Layout]) -> bool:
    """True if these can share an input without a copy."""
    first = layouts[0]
    return not isinstance(first, BlockLayout) or all(o.columns is first.columns for o in layouts)


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
        check(x, *one, "none")
        require(one.values.requires_grad, "values", "ones that are trained", "a frozen one")
    blocks = isinstance(layouts[0], BlockLayout)
    served = _serving(blocks, x.is_cuda, fused_activation(x), backend)
    tensors = [t for one in linears for t in (one.weight.detach(), one.values, one.bias)]
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, tensors = x.to(dtype), [None if t is None else t.to(dtype) for t in tensors]
        with torch.autocast(x.device.type, enabled=False):
            return _Grouped.apply(x, joined(layouts), served, *tensors)  # type: ignore[no-untyped-call]
    return _Grouped.apply(x, joined(layouts), served, *tensors)  # type: ignore[no-untyped-call]


@constant_when_traced
def _serving(blocks: bool, cuda: bool, fused: bool, backend: str) -> str:
    return _decide(blocks, cuda, fused, backend).backend


@cache
def _decide(blocks: bool, cuda: bool, fused: bool, backend: str) -> Choice:
    """The kernels that form the gradients; the reference runs linears alone."""
    here = cuda or environment.interpreting()
    refusals = {
        "triton": None if here else "x is not on a GPU",
        "native": "triton serves blocks on a GPU" if blocks and cuda else None,
    }
    return choose(refusals, backend, prefer=("triton", "native") if fused else ("native",))


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
