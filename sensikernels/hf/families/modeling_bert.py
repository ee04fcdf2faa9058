"""BERT with per-layer widths: the classes that ``compact`` makes and ``from_pretrained`` loads.

This file is saved with every compact checkpoint and imports nothing of this package, so that
``from_pretrained(..., trust_remote_code=True)`` works where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention, eager_attention_forward


class SkBertConfig(BertConfig):
    """``BertConfig`` plus ``widths``: per layer ``heads, qk_head_size, vo_head_size, neurons``.

    Keys of ``widths`` are layer numbers as strings, since JSON has no other.
    """

    model_type = "sk_bert"

    def __init__(self, widths: Mapping[str, Mapping[str, int]] | None = None, **named: Any) -> None:
        self.widths = {k: dict(v) for k, v in (widths or {}).items()}
        super().__init__(**named)


class TrimmedSelfAttention(BertSelfAttention):
    """HF's self-attention with ``qk_head_size`` and ``vo_head_size`` of their own.

    The scaling stays that of the untrimmed head, so that zeroed and removed dimensions agree.
    """

    qk_head_size: int
    vo_head_size: int

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[batch, sequence, hidden]`` to ``[batch, sequence, heads · vo_head_size]``."""
        lead = hidden_states.shape[:-1]

        def heads(projection: Callable[[Tensor], Tensor], size: int) -> Tensor:
            return projection(hidden_states).view(*lead, -1, size).transpose(1, 2)

        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs.pop("past_key_values", None)
        out, weights = attend(
            self,
            heads(self.query, self.qk_head_size),
            heads(self.key, self.qk_head_size),
            heads(self.value, self.vo_head_size),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return out.reshape(*lead, -1).contiguous(), weights


def resize(model: nn.Module, config: SkBertConfig) -> None:
    """Give every encoder layer of a freshly built BERT the widths of ``config``."""
    encoder: Any = model.bert if hasattr(model, "bert") else model
    for number, width in config.widths.items():
        layer = encoder.encoder.layer[int(number)]
        attention = layer.attention.self
        query_key = width["heads"] * width["qk_head_size"]
        value = width["heads"] * width["vo_head_size"]
        hidden = config.hidden_size
        attention.query = nn.Linear(hidden, query_key)
        attention.key = nn.Linear(hidden, query_key)
        attention.value = nn.Linear(hidden, value)
        layer.attention.output.dense = nn.Linear(value, hidden)
        layer.intermediate.dense = nn.Linear(hidden, width["neurons"])
        layer.output.dense = nn.Linear(width["neurons"], hidden)
        attention.num_attention_heads, attention.all_head_size = width["heads"], query_key
        full = attention.attention_head_size
        if (width["qk_head_size"], width["vo_head_size"]) != (full, full):
            attention.__class__ = TrimmedSelfAttention
            attention.qk_head_size = width["qk_head_size"]
            attention.vo_head_size = width["vo_head_size"]


class _Resized:
    """A BERT class whose layers get the widths of its config."""

    config_class = SkBertConfig

    def __init__(self, config: SkBertConfig, **named: Any) -> None:
        super().__init__(config, **named)  # type: ignore[call-arg]
        resize(self, config)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]


class SkBertModel(_Resized, BertModel):
    """``BertModel`` with per-layer widths."""


class SkBertForSequenceClassification(_Resized, BertForSequenceClassification):
    """``BertForSequenceClassification`` with per-layer widths."""


class SkBertForTokenClassification(_Resized, BertForTokenClassification):
    """``BertForTokenClassification`` with per-layer widths."""


class SkBertForQuestionAnswering(_Resized, BertForQuestionAnswering):
    """``BertForQuestionAnswering`` with per-layer widths."""


class SkBertForMultipleChoice(_Resized, BertForMultipleChoice):
    """``BertForMultipleChoice`` with per-layer widths."""


class SkBertForNextSentencePrediction(_Resized, BertForNextSentencePrediction):
    """``BertForNextSentencePrediction`` with per-layer widths."""


class SkBertForMaskedLM(_Resized, BertForMaskedLM):
    """``BertForMaskedLM`` with per-layer widths."""


class SkBertForPreTraining(_Resized, BertForPreTraining):
    """``BertForPreTraining`` with per-layer widths."""


_CLASSES: dict[Any, type] = {
    AutoModel: SkBertModel,
    AutoModelForSequenceClassification: SkBertForSequenceClassification,
    AutoModelForTokenClassification: SkBertForTokenClassification,
    AutoModelForQuestionAnswering: SkBertForQuestionAnswering,
    AutoModelForMultipleChoice: SkBertForMultipleChoice,
    AutoModelForNextSentencePrediction: SkBertForNextSentencePrediction,
    AutoModelForMaskedLM: SkBertForMaskedLM,
    AutoModelForPreTraining: SkBertForPreTraining,
}
COMPACT_CLASSES: dict[type, type] = {kind.__bases__[1]: kind for kind in _CLASSES.values()}
"""The class with per-layer widths of every class without."""

AutoConfig.register("sk_bert", SkBertConfig, exist_ok=True)
SkBertConfig.register_for_auto_class()
for _auto, _compact in _CLASSES.items():
    _auto.register(SkBertConfig, _compact, exist_ok=True)
    _compact.register_for_auto_class(_auto.__name__)  # type: ignore[attr-defined]
