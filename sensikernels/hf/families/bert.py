"""BERT, and what its relatives share with it: names, layer walk and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers.models.bert import modeling_bert

from sensikernels.hf.family import (
    SIX_LINEARS,
    Block,
    Closing,
    Compact,
    Embedding,
    Family,
    LanguageHead,
    PackedStep,
)

_AROUND = {
    "embeddings": "Embeddings",
    "encoder": "Encoder",
    "encoder.layer.N": "Layer",
    "encoder.layer.N.attention": "Attention",
    "encoder.layer.N.attention.self": "SelfAttention",
    "encoder.layer.N.attention.output": "SelfOutput",
    "encoder.layer.N.intermediate": "Intermediate",
    "encoder.layer.N.output": "Output",
}
"""The modules whose forwards are not called, and how the names of their classes end."""


def embedding(encoder: Any) -> Embedding:
    """The modules of BERT's embeddings, and the linear after them where a relative has one."""
    block = encoder.embeddings
    tables = (block.word_embeddings, block.position_embeddings, block.token_type_embeddings)
    project = getattr(encoder, "embeddings_project", None)
    return Embedding(tables, block.LayerNorm, block.dropout, around=(block,), project=project)


def block(layer: Any) -> Block:
    """The modules of one of BERT's layers."""
    around, intermediate, output = layer.attention, layer.intermediate, layer.output
    attention, attended = around.self, around.output
    return Block(
        attention,
        projections=(attention.query, attention.key, attention.value),
        attended=Closing(attended.dense, attended.dropout, attended.LayerNorm),
        intermediate=intermediate.dense,
        activation=intermediate.intermediate_act_fn,
        output=Closing(output.dense, output.dropout, output.LayerNorm),
        around=(around, attention, attended, intermediate, output),
    )


def relative(
    modeling: Any,
    prefix: str,
    title: str,
    *,
    logits: Callable[[Any, Tensor], Tensor],
    positions: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None,
    **differences: Any,
) -> Family:
    """The family that transformers defines in ``modeling`` as it does BERT.

    ``prefix``: how the names of its classes begin. ``logits`` and ``positions``: as in
    ``LanguageHead`` and ``PackedStep``. ``differences``: fields of ``Family`` that are not BERT's.
    """

    def named(ending: str) -> Any:
        return vars(modeling)[f"{prefix}{ending}"]

    attention = named("SelfAttention")
    config: Any = getattr(transformers, f"{prefix}Config")
    names: Mapping[str, Any] = {
        "encoder": named("PreTrainedModel").base_model_prefix,
        "layers": "encoder.layer",
        "linears": {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attention_output": "attention.output.dense",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
        },
        "norms": {
            "attention_norm": "attention.output.LayerNorm",
            "output_norm": "output.LayerNorm",
        },
        "attention": "attention.self",
        "couplings": SIX_LINEARS,
        "packed": PackedStep(
            encoder=named("Model"),
            around={path: (named(ending),) for path, ending in _AROUND.items()},
            embedding=embedding,
            block=block,
            positions=positions,
            first_token=(named("ForSequenceClassification"),),
            answers=(named("ForQuestionAnswering"),),
            language=LanguageHead(model=named("ForMaskedLM"), logits=logits),
        ),
        "compact": Compact(
            config=config,
            attention=attention,
            counts={"num_attention_heads": "heads", "all_head_size": "qk"},
        ),
    }
    return Family(
        name=config.model_type,
        title=title,
        attentions={attention.__name__: modeling.__name__},
        **{**names, **differences},
    )


BERT = relative(modeling_bert, "Bert", "BERT", logits=lambda model, hidden: model.cls(hidden))
