"""The composition that the tests of ``dropout_add_norm`` compare it with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.dropout import dropout

DTYPES = [torch.float32, torch.bfloat16]
SEED = torch.tensor(2**40 + 12345)


def run(f: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = f(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def parts(p: float) -> Callable[..., Tensor]:
    """The composition, with the same mask."""

    def f(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = residual + dropout(x, p, seed=SEED, backend="reference")
        weight, bias = weight.to(z.dtype), bias.to(z.dtype)
        return F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12)

    return f
