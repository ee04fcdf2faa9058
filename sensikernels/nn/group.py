"""Selective linears that read the same input, run as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sensikernels._core import environment
from sensikernels._core.hooks import hooked, hooked_everywhere
from sensikernels.nn.selective import SelectiveLinear
from sensikernels.ops.selective_linear import Selected, selective_linear_grouped, why_apart


def grouped_selective_linear(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """``tuple(layer(x) for layer in layers)``; where they can share it, the backward is one.

    Query, key and value of an attention read the same ``x [..., in_features]``: their kept entries
    get their gradients from one product, x is saved once, and its three gradients are summed by
    the GEMMs that make them. Layers that cannot share (``group_refusal`` says why) run alone.
    """
    if group_refusal(x, layers) is not None:
        return tuple(layer(x) for layer in layers)
    linears = []
    for layer in layers:
        assert isinstance(layer, SelectiveLinear)
        layer.refresh()
        linears.append(Selected(layer.weight, layer.values, layer.layout, layer.bias))
    first = layers[0]
    assert isinstance(first, SelectiveLinear)
    return selective_linear_grouped(x, linears, backend=first.backend)


def group_refusal(x: Tensor, layers: Sequence[nn.Module]) -> str | None:
    """The reason for which ``layers`` run alone on ``x``; None if they run as one."""
    selective = [layer for layer in layers if isinstance(layer, SelectiveLinear)]
    if len(selective) < 2 or len(selective) != len(layers):
        return "a group is two or three SelectiveLinear"
    if not torch.is_grad_enabled() or not all(layer.values.requires_grad for layer in selective):
        return "nothing of some layer's weight is trained"
    if hooked_everywhere() or any(map(hooked, selective)):
        return "hooks wait at some layer"
    backends = {layer.backend for layer in selective}
    if any(layer.activation != "none" for layer in selective) or len(backends) > 1:
        return "they differ in backend, or have an activation"
    asked = environment.backend() if backends == {"auto"} else selective[0].backend
    if asked == "reference":
        return "backend reference runs layers alone"
    return why_apart([layer.layout for layer in selective], x.dtype)
