"""The definition of a masked linear, in plain PyTorch; autograd differentiates it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sensikernels.layouts import Layout, full_weight


def masked_linear(
    x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, activation: str
) -> Tensor:
    """``act(x @ W^T + bias)``, W being ``full_weight(values)``; any float dtype."""
    pre = F.linear(x, full_weight(values, layout, compact=True), bias)
    return F.gelu(pre) if activation == "gelu" else pre
