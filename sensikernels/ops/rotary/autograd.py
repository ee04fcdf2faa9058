"""The derivative: the gradient turned the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.rotary import ops

_OPS = torch.ops.sensikernels


class Rotary(torch.autograd.Function):
    """Saves the angles, nothing of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.inverse, ctx.backend = inverse, backend
        run = ops.launch if unwatched(x) else _OPS.rotary
        out: Tensor = run(x, cos, sin, inverse, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        turned = (*ctx.saved_tensors, not ctx.inverse, ctx.backend)
        dx = Rotary.apply(grads[0], *turned)  # type: ignore[no-untyped-call]
        return dx, None, None, None, None
