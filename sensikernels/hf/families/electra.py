"""ELECTRA: BERT's layers behind embeddings of another width, without a pooler."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.electra import modeling_electra

from sensikernels.hf.families.bert import relative


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.generator_lm_head(model.generator_predictions(hidden))
    return logits


ELECTRA = relative(
    modeling_electra,
    "Electra",
    "ELECTRA",
    logits=_logits,
    below=("embeddings", "embeddings_project"),
)
