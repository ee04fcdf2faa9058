"""The operators behind ``selective_linear``: the gradient of the kept entries, and only of those.

``sizes`` and ``index`` are a layout, as ``layouts.to_arguments`` writes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels import _blocks
from sensikernels._checks import require
from sensikernels.layouts import BlockLayout, PackedLayout, from_arguments

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "selective_grad_values(Tensor dy, Tensor x, int[] sizes, Tensor[] index, str backend) -> Tensor"
)
_LIB.define("selective_grad_activation(Tensor dy, Tensor pre, str backend) -> (Tensor, Tensor)")


def grad_values(dy: Tensor, x: Tensor, layout: PackedLayout | BlockLayout, backend: str) -> Tensor:
    """``dy^T @ x`` at the kept entries."""
    if backend == "triton":
        from sensikernels.ops.selective_linear.triton import selective_grad_values

        return selective_grad_values(dy, x, layout)
    if dy.is_cuda or not isinstance(layout, BlockLayout):
        require(False, "backend", "triton for this layout and device", "native")
    assert isinstance(layout, BlockLayout)
    return _blocks.grad_values(dy, x, layout)


def grad_activation(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``(dpre, dbias)``."""
    if backend == "triton":
        from sensikernels.ops.selective_linear.triton import selective_backward_activation

        return selective_backward_activation(dy, pre)
    dpre = torch.ops.aten.gelu_backward(dy.contiguous(), pre)
    return dpre, dpre.sum(0)


def _grad_values(
    dy: Tensor, x: Tensor, sizes: list[int], index: list[Tensor], backend: str
) -> Tensor:
    return grad_values(dy, x, from_arguments(sizes, index), backend)


for _device in ("CPU", "CUDA"):
    _LIB.impl("selective_grad_values", _grad_values, _device)
    _LIB.impl("selective_grad_activation", grad_activation, _device)


@torch.library.register_fake("sensikernels::selective_grad_activation")
def _(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1])


@torch.library.register_fake("sensikernels::selective_grad_values")
def _(dy: Tensor, x: Tensor, sizes: list[int], index: list[Tensor], backend: str) -> Tensor:
    return dy.new_empty(from_arguments(sizes, index).values_shape)


@register_flop_formula(torch.ops.sensikernels.selective_grad_values)
def _(dy: Any, x: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * dy[0] * sizes[0])
