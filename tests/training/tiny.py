"""A random BERT of two layers on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from sensikernels.data import load


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
