"""BERT: names, layer walk and heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from transformers.models.bert import modeling_bert as bert

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


def _home(model_type: str) -> str:
    return f"transformers.models.{model_type}.modeling_{model_type}"


def _embedding(encoder: Any) -> Embedding:
    block = encoder.embeddings
    tables = (block.word_embeddings, block.position_embeddings, block.token_type_embeddings)
    return Embedding(tables, block.LayerNorm, block.dropout, around=(block,))


def _block(layer: Any) -> Block:
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


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.cls(hidden)
    return logits


BERT = Family(
    name="bert",
    title="BERT",
    attentions={
        "BertSelfAttention": _home("bert"),
        # Relatives with BERT's layers: trimmed with masks, as far as no family is their own.
        "RobertaSelfAttention": _home("roberta"),
        "XLMRobertaSelfAttention": _home("xlm_roberta"),
        "CamembertSelfAttention": _home("camembert"),
        "ElectraSelfAttention": _home("electra"),
    },
    encoder="bert",
    layers="encoder.layer",
    linears={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
    norms={"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"},
    attention="attention.self",
    couplings=SIX_LINEARS,
    packed=PackedStep(
        encoder=BertModel,
        around={
            "embeddings": (bert.BertEmbeddings,),
            "encoder": (bert.BertEncoder,),
            "encoder.layer.N": (bert.BertLayer,),
            "encoder.layer.N.attention": (bert.BertAttention,),
            "encoder.layer.N.attention.self": (bert.BertSelfAttention,),
            "encoder.layer.N.attention.output": (bert.BertSelfOutput,),
            "encoder.layer.N.intermediate": (bert.BertIntermediate,),
            "encoder.layer.N.output": (bert.BertOutput,),
        },
        embedding=_embedding,
        block=_block,
        first_token=(BertForSequenceClassification,),
        by_row=(BertForQuestionAnswering,),
        language=LanguageHead(model=BertForMaskedLM, logits=_logits),
    ),
    compact=Compact(
        config=BertConfig,
        attention=bert.BertSelfAttention,
        counts={"num_attention_heads": "heads", "all_head_size": "qk"},
    ),
)
