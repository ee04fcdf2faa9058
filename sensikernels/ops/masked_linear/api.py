"""The public function ``masked_linear``, its checks and its autocast rule."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels.layouts import CompactLayout, Layout
from sensikernels.ops.common.linears import check_operands, linear
from sensikernels.ops.masked_linear import dispatch, reference
from sensikernels.ops.masked_linear.autograd import CompactLinear, KernelLinear


def masked_linear(
    x: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """``act(x @ W^T + bias)``, W being ``full_weight(values, layout)``: zero where nothing is kept.

    The mask multiplies the weight only: a full-width output keeps the bias of dropped rows.

    Args:
        x: ``[..., in_features]``, or ``[..., kept_in]`` for a layout with compact input.
        values: kept entries, shaped ``layout.values_shape``.
        layout: where they belong, on x's device; see ``sensikernels.layouts.layout_of``.
        bias: ``[out_features]``, or ``[kept_out]`` for a layout with compact output.
        activation: ``none`` or ``gelu`` (exact, by erf; only the pre-activation is saved).
        backend: ``auto`` chooses (``explain`` says what); ``reference``, ``native`` (oneDNN or
            cuBLAS on compact shapes, the compiled extension for blocks) or ``triton``.

    Returns:
        ``[..., out_features]`` or ``[..., kept_out]``, in x's dtype; under autocast in autocast's
        dtype. Differentiable in x, values and bias: once, or to any order for a compact layout
        with compact input and output.

    Raises:
        UsageError: shapes, dtypes or devices disagree, or a named backend cannot serve.
    """
    check_operands(x, values, layout, bias, activation, layout.in_width, layout.out_width)
    if backend == "auto":
        backend = environment.backend()
    if layout.direct and backend == "auto":
        return linear(x, values, bias, activation)
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _run(x, values, layout, bias, activation, backend)
    return _run(x, values, layout, bias, activation, backend)


def _run(
    x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, activation: str, backend: str
) -> Tensor:
    choice = dispatch.choice(layout, x, backend)
    if choice.form == "dense":
        return reference.masked_linear(x, values, layout, bias, activation)
    if choice.backend == "torch":
        assert isinstance(layout, CompactLayout)
        if layout.direct:
            return linear(x, values, bias, activation)
        compact = (x, values, bias, layout, activation)
        return CompactLinear.apply(*compact)  # type: ignore[no-untyped-call]
    arguments = (x, values, bias, layout, activation, choice.backend)
    return KernelLinear.apply(*arguments)  # type: ignore[no-untyped-call]
