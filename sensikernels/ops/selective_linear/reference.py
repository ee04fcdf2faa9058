"""The definition of a selective linear, in plain PyTorch; autograd differentiates it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.layouts import Layout, full_weight


def selective_linear(
    x: Tensor, weight: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, activation: str
) -> Tensor:
    """``act(x @ W^T + bias)``, W being the frozen ``weight`` with ``values`` put in; any float."""
    kept = full_weight(torch.ones_like(values), layout).bool()
    pre = F.linear(x, torch.where(kept, full_weight(values, layout), weight.detach()), bias)
    return F.gelu(pre) if activation == "gelu" else pre
