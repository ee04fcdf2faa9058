"""FLOPs of a training step, counted while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sensikernels._core.errors import UsageError
from sensikernels.masks import Plan, tokens_of
from sensikernels.ops.varlen_attention.ops import pairs_of

aten = torch.ops.aten


def _attention_forward(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward(
    grad_out: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: Any,
    *rest: Any,
    **named: Any,
) -> int:
    return 2 * _attention_forward(query, key, value)


def _packed_backward(*arguments: Any, **_: Any) -> int:
    """Of (out's gradient, out, logsumexp, state, query, key, value, boundaries of queries, …)."""
    query, _key, value, *_rest = call = arguments[4:]
    return 4 * pairs_of(call) * int(query.shape[1]) * int(query.shape[2] + value.shape[2])


_packed_backward._get_raw = True  # type: ignore[attr-defined]

# torch counts every attention kernel but the CPU's. Scores recomputed in backward do not count.
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def training_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward and backward of ``model(**batch).loss``, as ``FlopCounterMode`` counts.

    Parameters, gradients, training mode and the random state are left as they were.
    """
    grads = [(p, p.grad) for p in model.parameters()]
    was_training = model.training
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    packed = torch.ops.sensikernels.varlen_attention_backward
    counter = FlopCounterMode(
        display=False, custom_mapping={**_CPU_ATTENTION, packed: _packed_backward}
    )
    with torch.random.fork_rng(devices), torch.enable_grad():
        for parameter, _ in grads:
            parameter.grad = None
        model.train()
        with counter:
            model(**batch).loss.backward()
    model.train(was_training)
    for parameter, grad in grads:
        parameter.grad = grad
    return int(counter.get_total_flops())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Training FLOPs per token, counted."""

    flops_per_token: float
    dense_flops_per_token: float

    @property
    def ratio(self) -> float:
        """Measured FLOPs over dense FLOPs. Raises UsageError if there is no dense figure."""
        if not self.dense_flops_per_token:
            raise UsageError("plan: expected a dense FLOPs figure to compare with, got none")
        return self.flops_per_token / self.dense_flops_per_token


def measured_flops(
    plan: Plan, model: nn.Module, batch: Mapping[str, Tensor], *, dense: nn.Module | None = None
) -> Measured:
    """Count the FLOPs of one training step of ``model``, with ``plan`` applied, on ``batch``.

    With ``dense``, the same batch is counted on the dense model too, so that the ratio is
    measured over measured; without it the plan's own dense figure is the denominator.
    """
    tokens = tokens_of(batch)
    got = training_flops(model, batch) / tokens
    reference = plan.flops_dense if dense is None else training_flops(dense, batch) / tokens
    return Measured(flops_per_token=got, dense_flops_per_token=reference)
