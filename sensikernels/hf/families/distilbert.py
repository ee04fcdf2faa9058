"""DistilBERT: BERT's layers under other names, without token types and pooler."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DistilBertConfig
from transformers.models.distilbert import modeling_distilbert as modeling

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


def _embedding(encoder: Any) -> Embedding:
    block = encoder.embeddings
    tables = (block.word_embeddings, block.position_embeddings, None)
    return Embedding(tables, block.LayerNorm, block.dropout, around=(block,))


def _block(layer: Any) -> Block:
    attention, ffn = layer.attention, layer.ffn
    return Block(
        attention,
        projections=(attention.q_lin, attention.k_lin, attention.v_lin),
        attended=Closing(attention.out_lin, None, layer.sa_layer_norm),
        intermediate=ffn.lin1,
        activation=ffn.activation,
        output=Closing(ffn.lin2, ffn.dropout, layer.output_layer_norm),
        around=(attention, ffn),
    )


def _logits(model: Any, hidden: Tensor) -> Tensor:
    inner = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    logits: Tensor = model.vocab_projector(inner)
    return logits


DISTILBERT = Family(
    name="distilbert",
    title="DistilBERT",
    attentions={"DistilBertSelfAttention": modeling.__name__},
    encoder="distilbert",
    layers="transformer.layer",
    linears={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
    },
    norms={"attention_norm": "sa_layer_norm", "output_norm": "output_layer_norm"},
    attention="attention",
    couplings=SIX_LINEARS,
    pooler="pre_classifier",
    pooler_linear="pre_classifier",
    config_names={
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
    },
    packed=PackedStep(
        encoder=modeling.DistilBertModel,
        around={
            "embeddings": (modeling.Embeddings,),
            "transformer": (modeling.Transformer,),
            "transformer.layer.N": (modeling.TransformerBlock,),
            "transformer.layer.N.attention": (modeling.DistilBertSelfAttention,),
            "transformer.layer.N.ffn": (modeling.FFN,),
        },
        embedding=_embedding,
        block=_block,
        first_token=(modeling.DistilBertForSequenceClassification,),
        answers=(modeling.DistilBertForQuestionAnswering,),
        language=LanguageHead(model=modeling.DistilBertForMaskedLM, logits=_logits),
    ),
    compact=Compact(
        config=DistilBertConfig,
        attention=modeling.DistilBertSelfAttention,
        counts={"n_heads": "heads", "dim": "vo"},
    ),
)
