"""Parts that the two linears share: checks of their operands, gelu and its derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.checks import expected, require_one_of
from sensikernels.layouts import Layout
from sensikernels.ops.common.checks import check_activation, check_layout
from sensikernels.ops.common.register import register

ACTIVATIONS = ("none", "gelu")


def check_operands(
    x: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None,
    activation: str,
    read: int,
    written: int,
) -> None:
    """Raise UsageError where they disagree; ``read`` and ``written``: features of x and bias."""
    if activation not in ACTIVATIONS:
        require_one_of(activation, "activation", ACTIVATIONS)
    if x.ndim == 0 or x.shape[-1] != read:
        raise expected("x", f"[..., {read}]", list(x.shape))
    if values.shape != layout.values_shape:
        raise expected("values", list(layout.values_shape), list(values.shape))
    if x.device != values.device:
        raise expected("values", f"a tensor on {x.device}", values.device)
    if x.dtype != values.dtype and not torch.is_autocast_enabled(x.device.type):
        raise expected("values", f"dtype {x.dtype} as x", values.dtype)
    if not x.is_floating_point():
        raise expected("x", "a floating dtype", x.dtype)
    if bias is not None:
        if bias.shape != (written,):
            raise expected("bias", [written], list(bias.shape))
        if bias.device != x.device:
            raise expected("bias", f"a tensor on {x.device}", bias.device)
        if bias.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise expected("bias", f"dtype {x.dtype} as x", bias.dtype)
    check_layout(layout, x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``act(x @ weight^T + bias)``."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if activation == "gelu" else y


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device; None where it is off."""
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def gelu_gradient(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``(dpre, dbias)``: ``dy [T, features]`` through gelu's derivative, and its sum over tokens.

    ``triton`` takes one pass over ``dy``. Raises UsageError for a dtype that it does not serve.
    """
    if backend == "triton":
        from sensikernels.ops.common.triton_gelu import column_sum
        from sensikernels.ops.common.triton_launch import NAMES

        if dy.dtype not in NAMES:
            raise expected("dy", f"one of {', '.join(map(str, NAMES))} for triton", dy.dtype)
        return column_sum(dy, pre)
    dpre = torch.ops.aten.gelu_backward(dy.contiguous(), pre)
    return dpre, dpre.sum(0)


def register_gelu_gradient(name: str) -> None:
    """Register ``gelu_gradient`` as an operator of that name."""
    schema = f"{name}(Tensor dy, Tensor pre, str backend) -> (Tensor, Tensor)"
    register(schema, _checked_gelu_gradient, gelu_gradient, _empty_gelu_gradient)


def _checked_gelu_gradient(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor, str]:
    check_activation(dy, pre, backend)
    return dy, pre, backend


def _empty_gelu_gradient(dy: Tensor, pre: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1])
