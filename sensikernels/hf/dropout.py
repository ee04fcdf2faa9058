"""Counter dropout through a whole BERT, attention included; reversible.

On a CPU, torch's dropout draws from one serial generator, and its attention with dropout widens
bfloat16 to float32: together 16 to 40 % of a bf16 step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sensikernels.errors import UsageError
from sensikernels.nn import CounterDropout
from sensikernels.ops.dropout import dropout as counter_dropout

ATTENTION = "sensikernels"
SHORT = 256
"""Keys up to which two products and a softmax beat torch 2.13's CPU kernel: forward and backward of
32 x 12 heads x 16 tokens x 32 in float32 take 3.7 ms against 22.6, of 2 x 12 x 512 x 64 71 ms
against 47."""
ATTENTION_RECORD = "_sensikernels_attention"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """HF's attention interface: ``[batch, heads, tokens, width]`` to ``[batch, tokens, heads, ·]``.

    Softmax and counter dropout in the activations' dtype; without dropout SDPA, but on a CPU only
    beyond ``SHORT`` keys, where its kernel catches up with plain products.
    """
    short = query.device.type == "cpu" and key.shape[2] <= SHORT
    if dropout == 0.0 and not short:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.transpose(1, 2), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = counter_dropout(torch.softmax(scores, -1), dropout)
    return torch.matmul(weights, value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Use this module's attention inside the block."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def use_counter_dropout(model: nn.Module) -> tuple[str, ...]:
    """Swap every ``nn.Dropout`` and the attention function; returns the modules replaced.

    Raises UsageError if it is in use already.
    """
    if hasattr(model, ATTENTION_RECORD):
        raise UsageError("model: expected torch's dropout, got counter dropout (already in use)")
    names = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    for name in names:
        _swap(model, name, CounterDropout)
    config: Any = model.config
    object.__setattr__(model, ATTENTION_RECORD, (tuple(names), config._attn_implementation))
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    return tuple(names)


def restore_dropout(model: nn.Module) -> None:
    """Undo ``use_counter_dropout``. Raises UsageError if it is not in use."""
    record = getattr(model, ATTENTION_RECORD, None)
    if record is None:
        raise UsageError("model: expected counter dropout in use, got torch's")
    names, implementation = record
    for name in names:
        _swap(model, name, nn.Dropout)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    object.__delattr__(model, ATTENTION_RECORD)


def _swap(model: nn.Module, name: str, kind: type[nn.Dropout]) -> None:
    parent, _, leaf = name.rpartition(".")
    old: Any = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, kind(old.p, old.inplace).train(old.training))
