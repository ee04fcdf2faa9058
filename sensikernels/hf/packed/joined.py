"""Query, key and value, or other linears of one input, as one product where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._core.hooks import bare
from sensikernels.layouts import CompactLayout
from sensikernels.nn import MaskedLinear, grouped_selective_linear

SMALL = 1 << 20
"""Bytes of weights up to which a CPU trains faster on one product: 3.15 against 3.32 ms for q, k, v
of MiniLM in bfloat16 at 448 tokens. Beyond, and without gradients, three take as long or less."""


def plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.linear`` on its own weight and bias and nothing else."""
    if bare(module, nn.Linear):
        return True
    return (
        bare(module, MaskedLinear)
        and isinstance(module.layout, CompactLayout)
        and module.layout.direct
        and module.activation == "none"
        and module.backend == "auto"
    )


def project(linears: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """The output ``[tokens, out]`` of every linear for one input ``x [tokens, in]``.

    Where that gains, plain ones are one product of weights put together anew in every call.
    Selective linears share the gradient of their kept entries where they can.
    """
    if not all(plain(linear) and linear.bias is not None for linear in linears):
        return grouped_selective_linear(x, linears)
    weights = [linear.weight for linear in linears]
    if not (x.is_cuda or (torch.is_grad_enabled() and sum(w.nbytes for w in weights) <= SMALL)):
        return [linear(x) for linear in linears]
    y = F.linear(x, torch.cat(weights), torch.cat([linear.bias for linear in linears]))
    return y.split([len(weight) for weight in weights], -1)
