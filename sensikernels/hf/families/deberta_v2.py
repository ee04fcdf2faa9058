"""DeBERTa-v2 and v3: attention scores hold products with projected relative positions."""

from __future__ import annotations

from transformers import DebertaV2Config
from transformers.models.deberta_v2 import modeling_deberta_v2 as modeling

from sensikernels.hf.family import SIX_LINEARS, Compact, Couples, Family

_POSITIONS = ("position_key", "position_query")
_HEADS, _NEURONS = SIX_LINEARS["heads"]

DEBERTA_V2 = Family(
    name="deberta-v2",
    title="DeBERTa-v2",
    attentions={"DisentangledSelfAttention": modeling.__name__},
    encoder="deberta",
    layers="encoder.layer",
    linears={
        "query": "attention.self.query_proj",
        "key": "attention.self.key_proj",
        "value": "attention.self.value_proj",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "position_key": "attention.self.pos_key_proj",
        "position_query": "attention.self.pos_query_proj",
    },
    norms={"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"},
    attention="attention.self",
    couplings={
        "heads": (
            Couples(
                kind="heads",
                rows=(*_HEADS.rows, *_POSITIONS),
                columns=_HEADS.columns,
                attention_flops=_HEADS.attention_flops,
            ),
            _NEURONS,
        )
    },
    optional=frozenset(_POSITIONS),
    compact=Compact(
        config=DebertaV2Config,
        attention=modeling.DisentangledSelfAttention,
        counts={"num_attention_heads": "heads", "all_head_size": "qk"},
    ),
    padded_because="relative positions inside attention",
)
