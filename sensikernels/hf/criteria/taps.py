"""The gradient of a unit's mask, read off activations on their way through backward.

A mask m = 1 on a unit's activation y has ∂L/∂m = Σ_t y_t · ∂L/∂y_t, so ranking needs no weight
gradient: weights can be frozen and dW never computed (Kwon et al. 2022, arXiv 2204.09656).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import require_one_of

STATISTICS = ("sum_batch_grad_squared", "sum_grad_squared")


class UnitTap:
    """Running Σ (∂L/∂m)² over batches, for the units on the last axis of one activation.

    ``sum_batch_grad_squared`` squares the gradient of each batch's mean loss;
    ``sum_grad_squared`` squares each example's own gradient (the empirical Fisher diagonal of
    the mask). They differ: see README of ``group_reduce``.
    """

    def __init__(self, units: int, statistic: str, device: torch.device) -> None:
        require_one_of(statistic, "statistic", STATISTICS)
        self.statistic = statistic
        self.total = torch.zeros(units, dtype=torch.float64, device=device)

    def add(self, activation: Tensor, grad: Tensor) -> None:
        """Add one batch: both are ``[batch, …, units · unit_size]``, grad of the mean loss."""
        units, batch = len(self.total), activation.shape[0]
        product = activation.float() * grad.float()
        per_example = product.reshape(batch, -1, units, product.shape[-1] // units).sum((1, 3))
        per_example = per_example.double()
        if self.statistic == "sum_batch_grad_squared":
            self.total += per_example.sum(0).square()
        else:
            self.total += (per_example * batch).square().sum(0)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, anchor: Tensor, unit_tap: UnitTap) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.unit_tap = unit_tap
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (activation,) = ctx.saved_tensors
        ctx.unit_tap.add(activation, grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None


def tap(activation: Tensor, anchor: Tensor, unit_tap: UnitTap) -> Tensor:
    """``activation`` unchanged; its mask gradient goes to ``unit_tap`` during backward.

    ``anchor`` is any tensor that requires grad: it keeps the graph alive when nothing below does,
    and backward stops here.
    """
    out: Tensor = _Tap.apply(activation, anchor, unit_tap)  # type: ignore[no-untyped-call]
    return out
