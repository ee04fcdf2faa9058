"""Counter dropout through a whole model, attention included; reversible.

On a CPU, torch's dropout draws from one serial generator, and its attention with dropout widens
bfloat16 to float32: together 16 to 40 % of a bf16 step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from sensikernels._core.errors import UsageError
from sensikernels.hf.inner import transformer_in
from sensikernels.hf.layers import all_layers
from sensikernels.nn import CounterDropout
from sensikernels.ops.dropout import dropout as counter_dropout

ATTENTION, EAGER = "sensikernels", "sensikernels-eager"
"""Names of this attention: in place of any, and in place of one that gives its weights."""
SHORT = 256
"""Keys up to which two products and a softmax beat torch 2.13's CPU kernel: forward and backward of
32 x 12 heads x 16 tokens x 32 in float32 take 3.7 ms against 22.6, of 2 x 12 x 512 x 64 71 ms
against 47."""
ATTENTION_RECORD = "_sensikernels_attention"


class _Options(NamedTuple):
    """The arguments of HF's attention interface that are named and not always given."""

    scaling: float | None = None
    dropout: float = 0.0
    is_causal: bool | None = None


def _options(named: Mapping[str, Any]) -> _Options:
    return _Options(**{name: named[name] for name in _Options._fields if name in named})


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, None]:
    """HF's attention interface: ``[batch, heads, tokens, width]`` to ``[batch, tokens, heads, ·]``.

    Softmax and counter dropout in the activations' dtype; without dropout SDPA, but on a CPU only
    beyond ``SHORT`` keys, where its kernel catches up with plain products. A decoder without a
    mask is causal, as in HF's SDPA. Of ``named`` it reads ``scaling``, ``dropout`` and
    ``is_causal``.
    """
    options = _options(named)
    short = query.device.type == "cpu" and key.shape[2] <= SHORT
    if options.dropout == 0.0 and not short:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=options.scaling,
            is_causal=_causal(module, query, attention_mask, options.is_causal),
        )
        return out.transpose(1, 2), None
    return _by_products(module, (query, key, value), attention_mask, options)[0], None


def eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor]:
    """HF's eager attention interface, with its weights: the mask is added to the scores."""
    mask = None if mask is None else mask.to(query.dtype)
    return _by_products(module, (query, key, value), mask, _options(named))


def _by_products(
    module: nn.Module,
    projected: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Two products and a softmax; a bool mask is True where a key is seen, another one is added."""
    query, key, value = projected
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    elif _causal(module, query, attention_mask, options.is_causal):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    weights = counter_dropout(torch.softmax(scores, -1), options.dropout)
    return torch.matmul(weights, value).transpose(1, 2), weights


def _causal(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, asked: bool | None
) -> bool:
    causal = bool(getattr(module, "is_causal", True)) if asked is None else asked
    return causal and attention_mask is None and query.shape[2] > 1


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(EAGER, eager)
AttentionMaskInterface.register(EAGER, eager_mask)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Use this module's attention inside the block."""
    before = set_attention(model, ATTENTION)
    try:
        yield
    finally:
        set_attention(model, before)


def use_counter_dropout(model: nn.Module) -> tuple[str, ...]:
    """Swap every ``nn.Dropout`` and the attention function; returns the modules replaced.

    Raises UsageError if it is in use already, or for a model of no known family.
    """
    if hasattr(model, ATTENTION_RECORD):
        raise UsageError("model: expected torch's dropout, got counter dropout (already in use)")
    all_layers(model)
    names = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    before = set_attention(model, ATTENTION)
    if before == "eager":
        set_attention(model, EAGER)
    for name in names:
        model.get_submodule(name).__class__ = CounterDropout
    object.__setattr__(model, ATTENTION_RECORD, (tuple(names), before))
    return tuple(names)


def restore_dropout(model: nn.Module) -> None:
    """Undo ``use_counter_dropout``, in the modules that are still there.

    Raises UsageError if it is not in use.
    """
    record = getattr(model, ATTENTION_RECORD, None)
    if record is None:
        raise UsageError("model: expected counter dropout in use, got torch's")
    names, implementation = record
    swapped = set(names)
    for name, module in model.named_modules():
        if name in swapped:
            module.__class__ = nn.Dropout
    set_attention(model, implementation)
    object.__delattr__(model, ATTENTION_RECORD)


def attention_before(model: nn.Module) -> str:
    """The name of the model's attention; with counter dropout in use, of the one before it."""
    record = getattr(model, ATTENTION_RECORD, None)
    implementation: str = _attention(model) if record is None else record[1]
    return implementation


def set_attention(model: nn.Module, name: str) -> str:
    """Have ``model`` use the attention of that name; returns the name of the one before.

    Raises UsageError where there is no transformers model.
    """
    before = _attention(model)
    transformer_in(model).set_attn_implementation(name)
    return before


def _attention(model: nn.Module) -> str:
    before: str = transformer_in(model).config._attn_implementation
    return before
