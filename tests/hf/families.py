"""Small random models of every family, with every head that transformers has for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels.hf.modeling_compact import stock_models

transformers = pytest.importorskip("transformers")

WORDS, ROWS, LENGTH, CHOICES, PAD = 97, 4, 9, 3, 1
_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "electra": {"embedding_size": 24, "summary_last_dropout": 0.0},
    "distilbert": dict.fromkeys(
        ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"), 0.0
    ),
    "mpnet": {"relative_attention_num_buckets": 32},
    "deberta-v2": {
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": False,
        "conv_kernel_size": 3,
    },
    # A window of 2 tokens on both sides in the second of two layers.
    "modernbert": {
        "local_attention": 4,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    },
}
"""By ``model_type``: the settings that are not BERT's."""
ROUNDED = {"modernbert": 1e-5}
"""By ``model_type``: how far from stock's a float64 model's outputs may be where stock computes
something in float32, as ModernBERT rotates queries and keys."""


def config_of(kind: str, *, dropout: float = 0.0, **named: Any) -> Any:
    """A small config of that ``model_type``."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.AutoConfig.for_model(
        kind, **{**_SIZES, **rates, **DIFFERENCES[kind], **named}
    )


def make(kind: str, head: str, **named: Any) -> nn.Module:
    """A random model; its norms and biases are random too, so that nothing cancels."""
    config = config_of(kind, **named)
    torch.manual_seed(1)
    model: nn.Module = stock_models(type(config))[head](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def heads_of(kind: str) -> list[str]:
    """The heads that transformers has for that kind."""
    return sorted(stock_models(type(config_of(kind))))


def draw(
    head: str, kind: str = "bert", *, ragged: bool = True, rows: int = ROWS
) -> dict[str, Tensor]:
    """A batch for that head: padded on the right, labels of padding not counted."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shape = (rows, CHOICES, LENGTH) if head == "ForMultipleChoice" else (rows, LENGTH)
    mask = torch.ones(shape, dtype=torch.long)
    if ragged:
        mask[0, ..., 5:] = 0
        mask[-1, ..., 7:] = 0
    words = torch.where(mask.bool(), ids(PAD + 1, WORDS, *shape), PAD)
    per_token = torch.where(mask[..., :LENGTH].bool(), ids(0, 2, *shape), -100)
    masked = torch.where(mask.bool(), ids(0, WORDS, *shape), -100)
    labels: dict[str, dict[str, Tensor]] = {
        "Model": {},
        "ForSequenceClassification": {"labels": ids(0, 2, rows)},
        "ForTokenClassification": {"labels": per_token},
        "ForQuestionAnswering": {
            "start_positions": ids(0, 4, rows),
            "end_positions": ids(0, 4, rows),
        },
        "ForMultipleChoice": {"labels": ids(0, CHOICES, rows)},
        "ForNextSentencePrediction": {"labels": ids(0, 2, rows)},
        "ForMaskedLM": {"labels": masked},
        "ForPreTraining": {"labels": masked, "next_sentence_label": ids(0, 2, rows)}
        if kind == "bert"
        else {"labels": per_token.clamp(min=0)},
    }
    return {"input_ids": words, "attention_mask": mask, **labels[head]}


def tensors(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model's output, by name."""
    return {k: v for k, v in model(**batch).items() if isinstance(v, Tensor)}
