"""Several linears of one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._hooks import bare
from sensikernels.layouts import PackedLayout
from sensikernels.nn import MaskedLinear, grouped_selective_linear


def plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.linear`` on its own weight and bias and nothing else."""
    if bare(module, nn.Linear):
        return True
    return (
        bare(module, MaskedLinear)
        and isinstance(module.layout, PackedLayout)
        and module.layout.direct
        and module.activation == "none"
        and module.backend == "auto"
    )


def project(linears: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """Every linear of ``x [tokens, in]``.

    On a GPU plain ones are one product of weights put together anew in every call: fewer launches.
    On a CPU three products take as long as one. Selective linears share the gradient of their kept
    entries where they can.
    """
    if not (x.is_cuda and all(plain(linear) and linear.bias is not None for linear in linears)):
        return grouped_selective_linear(x, linears)
    weights = [linear.weight for linear in linears]
    y = F.linear(x, torch.cat(weights), torch.cat([linear.bias for linear in linears]))
    return y.split([len(weight) for weight in weights], -1)
