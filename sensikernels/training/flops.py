"""The FLOPs of a run's training steps, counted while they run."""

from __future__ import annotations

from torch import nn

from sensikernels.masks import training_flops
from sensikernels.training.data import Data


def flops_per_token(model: nn.Module, data: Data) -> float:
    """Training FLOPs per token of all of the run's batches, padding included.

    One real row of every padded length that occurs is run and counted by ``FlopCounterMode``;
    lengths are weighted by how often they occur. FLOPs are linear in rows, so this is the run's
    own total, not that of one typical batch. The model is left as it was.
    """
    rows: dict[int, int] = {}
    for (batch_rows, length), count in data.geometry.shapes.items():
        rows[length] = rows.get(length, 0) + batch_rows * count
    total = 0
    for length, times in rows.items():
        batch = {name: value[:1] for name, value in data.of_length(length).items()}
        padded = batch["input_ids"].shape[1]
        total += training_flops(model, batch) * times * length // padded
    return total / data.geometry.tokens
