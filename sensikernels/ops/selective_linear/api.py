"""The public function ``selective_linear``, its checks and its autocast rule."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.layouts import Layout
from sensikernels.ops.common.linears import linear
from sensikernels.ops.selective_linear import dispatch, reference
from sensikernels.ops.selective_linear.autograd import SelectiveLinear
from sensikernels.ops.selective_linear.checks import check


def selective_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """``act(x @ weight^T + bias)`` whose weight gradient exists for the kept entries only.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, frozen. Its kept entries must equal ``values``
            (``layouts.assign_`` writes them): the forward reads ``weight`` alone, which is what
            makes it one dense GEMM. ``reference`` reads the kept entries from ``values``.
        values: the trained entries, shaped ``layout.values_shape``; they get the gradient.
        layout: where they belong. A block layout with compact input (output) reads only the
            input (output) features that have a kept block. x and y always have full width.
        bias: ``[out_features]``.
        activation: ``none`` or ``gelu`` (exact, by erf; only the pre-activation is saved).
        backend: ``auto`` chooses (``explain`` says what); ``reference``, ``native``, ``triton``.

    Saved for backward: of x the columns that the layout reads, nothing if ``values`` needs no
    gradient; weight only if x needs one; the pre-activation only for ``gelu``.

    Returns:
        ``[..., out_features]``, once differentiable in x, values and bias.

    Raises:
        UsageError: shapes, dtypes or devices disagree, or a named backend cannot serve.
    """
    check(x, weight, values, layout, bias, activation)
    backend = dispatch.choice(layout, x, backend).backend
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, values = x.to(dtype), weight.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _run(x, weight, values, layout, bias, activation, backend)
    return _run(x, weight, values, layout, bias, activation, backend)


def _run(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return reference.selective_linear(x, weight, values, layout, bias, activation)
    if not values.requires_grad:
        return linear(x, weight.detach(), bias, activation)
    arguments = (x, weight.detach(), values, bias, layout, activation, backend)
    return SelectiveLinear.apply(*arguments)  # type: ignore[no-untyped-call]
