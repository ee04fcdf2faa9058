"""MPNet: every head has a bias by relative position, which one table holds for all layers."""

from __future__ import annotations

from transformers import MPNetConfig
from transformers.models.mpnet import modeling_mpnet as modeling

from sensikernels.hf.family import SIX_LINEARS, Compact, Family

MPNET = Family(
    name="mpnet",
    title="MPNet",
    attentions={"MPNetSelfAttention": modeling.__name__},
    encoder="mpnet",
    layers="encoder.layer",
    linears={
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_output": "attention.attn.o",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
    norms={"attention_norm": "attention.LayerNorm", "output_norm": "output.LayerNorm"},
    attention="attention.attn",
    couplings={"heads": SIX_LINEARS["heads"]},
    compact=Compact(
        config=MPNetConfig,
        attention=modeling.MPNetSelfAttention,
        counts={"num_attention_heads": "heads", "all_head_size": "qk"},
        biased=True,
    ),
    padded_because="relative positions inside attention",
)
