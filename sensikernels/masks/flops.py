"""FLOPs that a training step really runs, counted while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sensikernels.ops.varlen_attention as _registered  # noqa: F401

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


def _packed_backward(
    grad_out: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_query: Tensor | None,
    cu_seqlens: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    queries = cu_seqlens if cu_seqlens_query is None else cu_seqlens_query
    pairs = int((queries.long().diff() * cu_seqlens.long().diff()).sum())
    return 4 * pairs * query.shape[1] * (query.shape[2] + value.shape[2])


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


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    """Padded tokens of a batch: the size of its ``input_ids``."""
    return batch["input_ids"].numel()
