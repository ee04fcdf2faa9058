"""FLOPs that a training step really runs, counted while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _attention_forward(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward(
    grad_out: tuple[int, ...], query: tuple[int, ...], key: tuple[int, ...], value: Any,
    *rest: Any, **named: Any,
) -> int:  # fmt: skip
    return 2 * _attention_forward(query, key, value)


# torch counts every attention kernel but the CPU's.
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
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
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
