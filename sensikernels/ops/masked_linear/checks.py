"""What a masked linear and its operator demand of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels.layouts import BlockLayout, CompactLayout, Layout
from sensikernels.ops.common.checks import check_kernels, check_layout, check_rank

ACTIVATIONS = ("none", "gelu")


def check(x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, activation: str) -> None:
    """Raise UsageError where shapes, dtypes or devices disagree."""
    if activation not in ACTIVATIONS:
        require_one_of(activation, "activation", ACTIVATIONS)
    if x.ndim == 0 or x.shape[-1] != layout.in_width:
        require(False, "x", f"[..., {layout.in_width}]", list(x.shape))
    if values.shape != layout.values_shape:
        require(False, "values", list(layout.values_shape), list(values.shape))
    if x.device != values.device:
        require(False, "values", f"a tensor on {x.device}", values.device)
    if x.dtype != values.dtype and not torch.is_autocast_enabled(x.device.type):
        require(False, "values", f"dtype {x.dtype} as x", values.dtype)
    if not x.is_floating_point():
        require(False, "x", "a floating dtype", x.dtype)
    if bias is not None:
        if bias.shape != (layout.out_width,):
            require(False, "bias", [layout.out_width], list(bias.shape))
        if bias.device != x.device:
            require(False, "bias", f"a tensor on {x.device}", bias.device)
        if bias.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            require(False, "bias", f"dtype {x.dtype} as x", bias.dtype)
    check_layout(layout, x)


def check_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    layout: CompactLayout | BlockLayout,
    activation: str,
    backend: str,
) -> None:
    """As ``check``, of a matrix x; nothing is cast."""
    check_kernels(backend, x)
    check_rank(x, "x", 2)
    for name, t in (("values", values), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            require(False, name, f"dtype {x.dtype} as x", t.dtype)
    check(x, values, layout, bias, activation)
