"""The operators behind ``masked_linear``: schemas, fakes, FLOPs. Kernels are chosen by name.

``sizes`` and ``index`` are a layout, as ``layouts.to_arguments`` writes it. Activations are
matrices ``[T, features]``; results are contiguous whatever the strides of the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels._core.checks import require
from sensikernels.layouts import BlockLayout, CompactLayout, from_arguments
from sensikernels.ops.common import blocks
from sensikernels.ops.common.checks import check_activation, check_tensor, product_layout
from sensikernels.ops.masked_linear import checks

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "masked_linear(Tensor x, Tensor values, Tensor? bias, int[] sizes, Tensor[] index, "
    "str activation, str backend) -> (Tensor, Tensor)"
)
_LIB.define("masked_linear_grad_activation(Tensor dy, Tensor pre, str backend) -> (Tensor, Tensor)")
_LIB.define(
    "masked_linear_grad_input(Tensor dy, Tensor values, int[] sizes, Tensor[] index, "
    "str backend) -> Tensor"
)
_LIB.define(
    "masked_linear_grad_values(Tensor dy, Tensor x, int[] sizes, Tensor[] index, "
    "str backend) -> Tensor"
)


def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    layout: CompactLayout | BlockLayout,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """``(y, pre-activation)``, the latter for gelu only."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_forward

        return masked_linear_forward(x, values, layout, bias, activation)
    pre = blocks.forward(x, values, _require_blocks(layout), bias)
    return (F.gelu(pre), pre) if activation == "gelu" else (pre, None)


def grad_activation(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``(dpre, dbias)``."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_backward_activation

        return masked_linear_backward_activation(dy, pre)
    dpre = torch.ops.aten.gelu_backward(dy.contiguous(), pre)
    return dpre, dpre.sum(0)


def grad_input(
    dy: Tensor, values: Tensor, layout: CompactLayout | BlockLayout, backend: str
) -> Tensor:
    """``dy @ W``, ``[T, in_width]``."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_grad_input

        return masked_linear_grad_input(dy, values, layout)
    return blocks.grad_input(dy, values, _require_blocks(layout))


def grad_values(dy: Tensor, x: Tensor, layout: CompactLayout | BlockLayout, backend: str) -> Tensor:
    """``dy^T @ x`` at the kept entries."""
    if backend == "triton":
        from sensikernels.ops.masked_linear.triton import masked_linear_grad_values

        return masked_linear_grad_values(dy, x, layout)
    return blocks.grad_values(dy, x, _require_blocks(layout))


def _require_blocks(layout: CompactLayout | BlockLayout) -> BlockLayout:
    if not (isinstance(layout, BlockLayout) and layout.row_ptr.is_cpu):
        require(False, "backend", "triton for this layout and device", "native")
    assert isinstance(layout, BlockLayout)
    return layout


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    index: list[Tensor],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = from_arguments(sizes, index)
    checks.check_forward(x, values, bias, layout, activation, backend)
    y, pre = forward(x, values, bias, layout, activation, backend)
    return y, x.new_empty(0) if pre is None else pre


def _grad_input(
    dy: Tensor, values: Tensor, sizes: list[int], index: list[Tensor], backend: str
) -> Tensor:
    layout = product_layout(dy, sizes, index, backend)
    check_tensor(values, "values", layout.values_shape, dy.dtype, dy.device)
    return grad_input(dy, values, layout, backend)


def _grad_values(
    dy: Tensor, x: Tensor, sizes: list[int], index: list[Tensor], backend: str
) -> Tensor:
    layout = product_layout(dy, sizes, index, backend)
    check_tensor(x, "x", (dy.shape[0], layout.in_width), dy.dtype, dy.device)
    return grad_values(dy, x, layout, backend)


def _grad_activation(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    check_activation(dy, pre, backend)
    return grad_activation(dy, pre, backend)


for _device in ("CPU", "CUDA"):
    _LIB.impl("masked_linear", _forward, _device)
    _LIB.impl("masked_linear_grad_activation", _grad_activation, _device)
    _LIB.impl("masked_linear_grad_input", _grad_input, _device)
    _LIB.impl("masked_linear_grad_values", _grad_values, _device)


@torch.library.register_fake("sensikernels::masked_linear")
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    index: list[Tensor],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = from_arguments(sizes, index)
    checks.check_forward(x, values, bias, layout, activation, backend)
    y = x.new_empty((x.shape[0], layout.out_width))
    return y, x.new_empty(y.shape if activation == "gelu" else 0)


@torch.library.register_fake("sensikernels::masked_linear_grad_activation")
def _(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    check_activation(dy, pre, backend)
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1])


@torch.library.register_fake("sensikernels::masked_linear_grad_input")
def _(dy: Tensor, values: Tensor, sizes: list[int], index: list[Tensor], backend: str) -> Tensor:
    layout = product_layout(dy, sizes, index, backend)
    check_tensor(values, "values", layout.values_shape, dy.dtype, dy.device)
    return dy.new_empty((dy.shape[0], layout.in_width))


@torch.library.register_fake("sensikernels::masked_linear_grad_values")
def _(dy: Tensor, x: Tensor, sizes: list[int], index: list[Tensor], backend: str) -> Tensor:
    layout = product_layout(dy, sizes, index, backend)
    check_tensor(x, "x", (dy.shape[0], layout.in_width), dy.dtype, dy.device)
    return dy.new_empty(layout.values_shape)


_PRODUCTS = torch.ops.sensikernels


@register_flop_formula(_PRODUCTS.masked_linear)
def _(x: Any, values: Any, bias: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * x[0] * sizes[0])


@register_flop_formula([_PRODUCTS.masked_linear_grad_input, _PRODUCTS.masked_linear_grad_values])
def _(dy: Any, other: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * dy[0] * sizes[0])
