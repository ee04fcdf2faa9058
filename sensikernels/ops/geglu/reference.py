"""The definition, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(a) · b`` of the halves of ``x + bias``, taken in float32 at least."""
    a, b = _halves(x, bias)
    return (F.gelu(a) * b).to(x.dtype)


def geglu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """``dx`` and the sum of it over all but the last dimension (empty if not needed)."""
    a, b = _halves(x, bias)
    wide = dy.to(a.dtype)
    da, db = torch.ops.aten.gelu_backward(wide * b, a), wide * F.gelu(a)
    dx = torch.cat([da, db], -1)
    if bias is None or not bias_needed:
        return dx.to(x.dtype), x.new_empty(0)
    return dx.to(x.dtype), dx.flatten(0, -2).sum(0).to(bias.dtype)


def _halves(x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide if bias is None else wide + bias
    # Of a last dimension of 0 torch makes one chunk.
    return wide.split(x.shape[-1] // 2, -1) if x.shape[-1] else (wide, wide)
