"""The FLOPs of a run's training steps, counted while they run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from sensikernels.masks import training_flops
from sensikernels.training.data import Data


def flops_per_token(model: nn.Module, data: Data) -> float:
    """Training FLOPs per token of all of the run's batches, padding included.

    One row of every padded length that occurs is run and counted by ``FlopCounterMode``; lengths
    are weighted by how often they occur. FLOPs are linear in rows, so this is the run's own
    total, not that of one typical batch. The model is left as it was.
    """
    rows: dict[int, int] = {}
    for (batch_rows, length), count in data.geometry.shapes.items():
        rows[length] = rows.get(length, 0) + batch_rows * count
    one = {name: value[:1] for name, value in data.largest().items()}
    total = sum(training_flops(model, _fit(one, length)) * n for length, n in rows.items())
    return total / data.geometry.tokens


def _fit(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """``batch`` cut or padded to ``length``."""
    return {
        name: value if value.ndim < 2 else functional.pad(value, (0, length - value.shape[1]))
        for name, value in batch.items()
    }
