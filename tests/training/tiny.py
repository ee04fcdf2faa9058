"""A random BERT of two layers on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensikernels.data import encode, load


def save_tiny(path: Path, *, layers: int = 2) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = {w for t in load("demo", split="dev").texts_a for w in t.replace("'", " ").split()}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(path)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(vocabulary)}).save_pretrained(path)
    return path


def trainer_rows(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first rows of the demo task as a ``transformers.Trainer`` takes them."""
    encoded = encode(load("demo", split="train").take(np.arange(count)), tokenizer)
    return [
        {
            "input_ids": row.input_ids.tolist(),
            "attention_mask": [1] * len(row.input_ids),
            "labels": int(row.label),
        }
        for row in (encoded[i] for i in range(count))
    ]
