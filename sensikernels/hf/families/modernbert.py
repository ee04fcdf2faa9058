"""ModernBERT: norms come first, positions are rotated, windows slide, the FFN is gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import ModernBertConfig
from transformers.models.modernbert import modeling_modernbert as modeling

from sensikernels.hf.family import (
    Compact,
    Couples,
    Embedding,
    Family,
    GatedBlock,
    LanguageHead,
    PackedStep,
)


def _embedding(encoder: Any) -> Embedding:
    block = encoder.embeddings
    return Embedding((block.tok_embeddings, None, None), block.norm, block.drop, around=(block,))


def _block(layer: Any) -> GatedBlock:
    attention, mlp, kind = layer.attn, layer.mlp, layer.attention_type
    return GatedBlock(
        norm=layer.attn_norm,
        projection=attention.Wqkv,
        attended=attention.Wo,
        dropout=attention.out_drop,
        ffn_norm=layer.mlp_norm,
        intermediate=mlp.Wi,
        activation=mlp.act,
        inner_dropout=mlp.drop,
        output=mlp.Wo,
        head_size=attention.head_dim,
        rate=attention.attention_dropout if attention.training else 0.0,
        scale=attention.head_dim**-0.5,
        rotation=kind,
        window=layer.config.sliding_window if kind == "sliding_attention" else None,
        around=(attention, mlp),
    )


def _rotations(
    encoder: Any, hidden: Tensor, positions: Tensor
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Cos and sin of every type of layer; transformers' hold the same twice, for both halves."""
    made = {}
    for kind in encoder.rotary_emb.layer_types:
        tables = encoder.rotary_emb(hidden, positions[None], kind)
        cos, sin = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)
        made[kind] = cos, sin
    return made


def _averages(config: Any) -> bool:
    return bool(config.classifier_pooling == "mean")


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.decoder(model.head(hidden))
    return logits


MODERNBERT = Family(
    name="modernbert",
    title="ModernBERT",
    attentions={"ModernBertAttention": modeling.__name__},
    encoder="model",
    layers="layers",
    linears={
        "query_key_value": "attn.Wqkv",
        "attention_output": "attn.Wo",
        "intermediate": "mlp.Wi",
        "output": "mlp.Wo",
    },
    norms={"attention_norm": "attn_norm", "output_norm": "mlp_norm"},
    attention="attn",
    # Rotations couple dimensions of a head, and one linear holds query, key and value: whole heads.
    couplings={
        "heads": (
            Couples(
                kind="heads",
                rows=("query_key_value",),
                columns=("attention_output",),
                attention_flops=4,
            ),
            Couples(kind="neurons", rows=("intermediate",), columns=("output",)),
        )
    },
    repeats={"query_key_value": 3, "intermediate": 2},
    below=("embeddings", "rotary_emb"),
    pooler="head",
    pooler_linear="head.dense",
    heads=("classifier",),
    packed=PackedStep(
        encoder=modeling.ModernBertModel,
        around={
            "embeddings": (modeling.ModernBertEmbeddings,),
            "layers.N": (modeling.ModernBertEncoderLayer,),
            "layers.N.attn": (modeling.ModernBertAttention,),
            "layers.N.mlp": (modeling.ModernBertMLP,),
        },
        embedding=_embedding,
        block=_block,
        rotations=_rotations,
        windowed=True,
        closing="final_norm",
        first_token=(
            modeling.ModernBertForSequenceClassification,
            modeling.ModernBertForMultipleChoice,
        ),
        averages=_averages,
        answers=(modeling.ModernBertForQuestionAnswering,),
        language=LanguageHead(model=modeling.ModernBertForMaskedLM, logits=_logits),
    ),
    compact=Compact(config=ModernBertConfig),
)
