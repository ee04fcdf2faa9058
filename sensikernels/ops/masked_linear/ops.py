"""The operators behind ``masked_linear``: schemas, fakes, FLOPs. Kernels are named, not chosen.

``sizes`` and ``index`` are a layout, as ``layouts.to_arguments`` writes it. Activations are
matrices ``[T, features]``; results are contiguous whatever the strides of the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels._core.checks import expected
from sensikernels.layouts import BlockLayout
from sensikernels.ops.common import blocks
from sensikernels.ops.common.carried import Carried, carried
from sensikernels.ops.common.checks import check_tensor, product_layout
from sensikernels.ops.common.linears import register_gelu_gradient
from sensikernels.ops.common.register import register
from sensikernels.ops.masked_linear import checks


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layout: Carried, activation: str, backend: str
) -> tuple[Tensor, Tensor | None]:
    """``(y, pre-activation)``, the latter for gelu only."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_forward

        return masked_linear_forward(x, values, layout, bias, activation)
    pre = blocks.forward(x, values, _require_blocks(layout), bias)
    return (F.gelu(pre), pre) if activation == "gelu" else (pre, None)


def grad_input(dy: Tensor, values: Tensor, layout: Carried, backend: str) -> Tensor:
    """``dy @ W``, ``[T, in_width]``."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_grad_input

        return masked_linear_grad_input(dy, values, layout)
    return blocks.grad_input(dy, values, _require_blocks(layout))


def grad_values(dy: Tensor, x: Tensor, layout: Carried, backend: str) -> Tensor:
    """``dy^T @ x`` at the kept entries."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_grad_values

        return masked_linear_grad_values(dy, x, layout)
    return blocks.grad_values(dy, x, _require_blocks(layout))


def _require_blocks(layout: Carried) -> BlockLayout:
    if not (isinstance(layout, BlockLayout) and layout.row_ptr.is_cpu):
        raise expected("backend", "triton for this layout and device", "native")
    return layout


def _checked_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, *listed: Any
) -> tuple[Tensor, Tensor, Tensor | None, Carried, str, str]:
    sizes, index, activation, backend = listed
    layout = carried(sizes, index)
    checks.check_forward(x, values, bias, layout, activation, backend)
    return x, values, bias, layout, activation, backend


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, pre = forward(x, *rest)
    return y, x.new_empty(0) if pre is None else pre


def _empty_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layout: Carried, activation: str, _: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], layout.out_width))
    return y, x.new_empty(y.shape if activation == "gelu" else 0)


def _checked_input(dy: Tensor, values: Tensor, *listed: Any) -> tuple[Tensor, Tensor, Carried, str]:
    layout = product_layout(dy, *listed)
    check_tensor(values, "values", layout.values_shape, dy.dtype, dy.device)
    return dy, values, layout, listed[-1]


def _checked_values(dy: Tensor, x: Tensor, *listed: Any) -> tuple[Tensor, Tensor, Carried, str]:
    layout = product_layout(dy, *listed)
    check_tensor(x, "x", (dy.shape[0], layout.in_width), dy.dtype, dy.device)
    return dy, x, layout, listed[-1]


def _empty_input(dy: Tensor, values: Tensor, layout: Carried, _: str) -> Tensor:
    return dy.new_empty((dy.shape[0], layout.in_width))


def _empty_values(dy: Tensor, x: Tensor, layout: Carried, _: str) -> Tensor:
    return dy.new_empty(layout.values_shape)


register(
    "masked_linear(Tensor x, Tensor values, Tensor? bias, int[] sizes, Tensor[] index, "
    "str activation, str backend) -> (Tensor, Tensor)",
    _checked_forward,
    _forward,
    _empty_forward,
)
register(
    "masked_linear_grad_input(Tensor dy, Tensor values, int[] sizes, Tensor[] index, "
    "str backend) -> Tensor",
    _checked_input,
    grad_input,
    _empty_input,
)
register(
    "masked_linear_grad_values(Tensor dy, Tensor x, int[] sizes, Tensor[] index, "
    "str backend) -> Tensor",
    _checked_values,
    grad_values,
    _empty_values,
)
register_gelu_gradient("masked_linear_grad_activation")

_PRODUCTS = torch.ops.sensikernels


@register_flop_formula(_PRODUCTS.masked_linear)
def _(x: Any, values: Any, bias: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * x[0] * sizes[0])


@register_flop_formula([_PRODUCTS.masked_linear_grad_input, _PRODUCTS.masked_linear_grad_values])
def _(dy: Any, other: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * dy[0] * sizes[0])
