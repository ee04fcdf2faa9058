"""Small random BERTs and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

TASKS = {
    "classification": transformers.BertForSequenceClassification,
    "answering": transformers.BertForQuestionAnswering,
}


def make_model(task: str = "classification", *, dropout: float = 0.0, **named: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | named
    config = transformers.BertConfig(
        intermediate_size=sizes.pop("intermediate_size", 48),
        vocab_size=sizes.pop("vocab_size", 97),
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **sizes,
    )
    model: nn.Module = TASKS[task](config)
    # Random LayerNorms and biases: nothing cancels by being zero or one.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_batch(
    task: str = "classification", *, rows: int = 4, length: int = 9, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    batch = {"input_ids": draw(97, rows, length), "attention_mask": mask}
    if task == "answering":
        return batch | {"start_positions": draw(4, rows), "end_positions": draw(4, rows)}
    return batch | {"labels": draw(3, rows) - 1}


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)
