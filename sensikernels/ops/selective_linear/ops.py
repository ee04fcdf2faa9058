"""The operator behind ``selective_linear``: the gradient of the kept entries, and only of those.

``sizes`` and ``index`` are a layout, as ``layouts.to_arguments`` writes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels import _blocks
from sensikernels._checks import require
from sensikernels.layouts import BlockLayout, from_arguments

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "selective_grad_values(Tensor dy, Tensor x, int[] sizes, Tensor[] index, str backend) -> Tensor"
)


def _grad_values(
    dy: Tensor, x: Tensor, sizes: list[int], index: list[Tensor], backend: str
) -> Tensor:
    layout = from_arguments(sizes, index)
    if backend == "triton":
        from sensikernels.ops.selective_linear.triton import selective_grad_values

        return selective_grad_values(dy, x, layout)
    ok = isinstance(layout, BlockLayout) and not dy.is_cuda
    require(ok, "backend", "triton for this layout and device", "native")
    assert isinstance(layout, BlockLayout)
    return _blocks.grad_values(dy, x, layout)


_LIB.impl("selective_grad_values", _grad_values, "CPU")
_LIB.impl("selective_grad_values", _grad_values, "CUDA")


@torch.library.register_fake("sensikernels::selective_grad_values")
def _(dy: Tensor, x: Tensor, sizes: list[int], index: list[Tensor], backend: str) -> Tensor:
    return dy.new_empty(from_arguments(sizes, index).values_shape)


@register_flop_formula(torch.ops.sensikernels.selective_grad_values)
def _(dy: Any, x: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    return int(2 * dy[0] * sizes[0])
