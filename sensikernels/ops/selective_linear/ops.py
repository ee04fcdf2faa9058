"""The operators behind ``selective_linear``: the gradient of the kept entries, and only of those.

``sizes`` and ``index`` are a layout, as ``layouts.to_arguments`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels._core.checks import expected, require
from sensikernels.layouts import BlockLayout, to_arguments
from sensikernels.ops.common import blocks
from sensikernels.ops.common.carried import Carried
from sensikernels.ops.common.linears import register_gelu_gradient
from sensikernels.ops.common.register import register
from sensikernels.ops.selective_linear.checks import alone, apart


def grad_values(dy: Tensor, x: Tensor, layout: Carried, backend: str) -> Tensor:
    """``dy^T @ x`` at the kept entries."""
    if backend == "triton":
        from sensikernels.ops.selective_linear.triton import selective_grad_values

        return selective_grad_values(dy, x, layout)
    if dy.is_cuda or not isinstance(layout, BlockLayout):
        raise expected("backend", "triton for this layout and device", "native")
    return blocks.grad_values(dy, x, layout)


def grad_values_grouped(
    dys: Sequence[Tensor], x: Tensor, layouts: Sequence[Carried], backend: str
) -> list[Tensor]:
    """``dy^T @ x`` at the kept entries of each layout; the dys are those of kept rows alone."""
    if backend == "triton":
        from sensikernels.ops.selective_linear.triton import selective_grad_values_grouped

        return selective_grad_values_grouped(dys, x, layouts)
    of_blocks = [layout for layout in layouts if isinstance(layout, BlockLayout)]
    if of_blocks:
        require(not x.is_cuda, "backend", "triton for blocks on a GPU", "native")
        return blocks.grad_values_grouped(dys, x, of_blocks)
    product = (dys[0] if len(dys) == 1 else torch.cat(list(dys), 1)).T @ x
    return list(product.split([dy.shape[1] for dy in dys]))


def grouped_through_dispatcher(
    dys: Sequence[Tensor], x: Tensor, layouts: Sequence[Carried], backend: str
) -> list[Tensor]:
    """``grad_values_grouped`` where something watches operators."""
    sizes, index = zip(*map(to_arguments, layouts), strict=True)
    flat = [i for one in sizes for i in one], [t for one in index for t in one]
    got: list[Tensor] = torch.ops.sensikernels.selective_grad_values_grouped(
        list(dys), x, *flat, backend
    )
    return got


def _grad_values_grouped(*call: Any) -> list[Tensor]:
    # An operator's results may not share memory.
    got = grad_values_grouped(*call)
    return [one if one.untyped_storage().nbytes() == one.nbytes else one.clone() for one in got]


def _checked(dy: Tensor, x: Tensor, *listed: Any) -> tuple[Tensor, Tensor, Carried, str]:
    return dy, x, alone(dy, x, *listed), listed[-1]


def _checked_grouped(
    dys: list[Tensor], x: Tensor, *listed: Any
) -> tuple[list[Tensor], Tensor, Sequence[Carried], str]:
    return dys, x, apart(dys, x, *listed), listed[-1]


def _empty(dy: Tensor, x: Tensor, layout: Carried, _: str) -> Tensor:
    return dy.new_empty(layout.values_shape)


def _empty_grouped(
    dys: list[Tensor], x: Tensor, layouts: Sequence[Carried], _: str
) -> list[Tensor]:
    return [x.new_empty(layout.values_shape) for layout in layouts]


register(
    "selective_grad_values(Tensor dy, Tensor x, int[] sizes, Tensor[] index, str backend)"
    " -> Tensor",
    _checked,
    grad_values,
    _empty,
)
register(
    "selective_grad_values_grouped(Tensor[] dys, Tensor x, int[] sizes, Tensor[] index, "
    "str backend) -> Tensor[]",
    _checked_grouped,
    _grad_values_grouped,
    _empty_grouped,
)
register_gelu_gradient("selective_grad_activation")


@register_flop_formula(torch.ops.sensikernels.selective_grad_values)
def _(dy: Any, x: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * dy[0] * sizes[0])


@register_flop_formula(torch.ops.sensikernels.selective_grad_values_grouped)
def _(dys: Any, x: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * x[0] * sum(sizes[:: len(sizes) // len(dys)]))
