"""The definition, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """``(x + bias) Φ(x + bias)``, taken in float32 at least."""
    return F.gelu(_preactivation(x, bias)).to(x.dtype)


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """``dx`` and the sum of it over all but the last dimension (empty if not needed)."""
    pre = _preactivation(x, bias)
    dx = torch.ops.aten.gelu_backward(dy.to(pre.dtype), pre)
    if bias is None or not bias_needed:
        return dx.to(x.dtype), x.new_empty(0)
    return dx.to(x.dtype), dx.flatten(0, -2).sum(0).to(bias.dtype)


def _preactivation(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide if bias is None else wide + bias
