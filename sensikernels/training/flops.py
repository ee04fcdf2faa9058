"""The FLOPs of a run's training steps, counted while they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensikernels.hf import training_flops, uncached
from sensikernels.training.data import Data

_PER_TOKEN = ("input_ids", "token_type_ids", "attention_mask", "position_ids")
_LABELS = ("labels", "start_positions", "end_positions")
_EXTRA = 64  # rows of no sequence that are counted to find what one of them costs


def flops_per_token(model: nn.Module, data: Data) -> float:
    """Training FLOPs per token of all of the run's batches, padding and rounding included.

    One row of every length that occurs is run and counted by ``FlopCounterMode``; lengths
    are weighted by how often they occur. FLOPs are linear in rows, so this is the run's own
    total, not that of one typical batch. A kept prefix counts as computed, as in the first epoch.
    The model is left as it was.
    """
    with uncached(model):
        return _counted(model, data)


def _counted(model: nn.Module, data: Data) -> float:
    rows: dict[int, int] = {}  # whole lengths, as data have
    for (batch_rows, length), count in data.geometry.shapes.items():
        rows[int(length)] = rows.get(int(length), 0) + batch_rows * count
    batch = data.largest()
    if data.geometry.packed is None:
        by_token = set(_PER_TOKEN) | ({"labels"} if _labels_tokens(data) else set())
        one = {name: value[:1] for name, value in batch.items()}
        total = sum(
            training_flops(model, _fit(one, length, by_token)) * n for length, n in rows.items()
        )
        return total / data.geometry.tokens
    alone = {length: training_flops(model, _alone(batch, length)) for length in rows}
    length = next(iter(rows))
    more = training_flops(model, _alone(batch, length, extra=_EXTRA)) - alone[length]
    filling = int(data.geometry.tokens - data.geometry.real_tokens)
    total = sum(alone[length] * n for length, n in rows.items()) + more * filling // _EXTRA
    return total / data.geometry.tokens


def _labels_tokens(data: Data) -> bool:
    encoded: Any = data.train.dataset
    return bool(encoded.per == "token")


def _fit(batch: Mapping[str, Tensor], length: int, by_token: set[str]) -> dict[str, Tensor]:
    """``batch`` cut or padded to ``length``."""
    return {
        name: functional.pad(value, (0, length - value.shape[1])) if name in by_token else value
        for name, value in batch.items()
    }


def _alone(batch: Mapping[str, Any], length: int, extra: int = 0) -> dict[str, Any]:
    """A packed batch of one sequence of ``length`` tokens, and ``extra`` rows of none."""
    ids = batch["input_ids"]
    made = {
        "input_ids": ids.new_zeros(1, length + extra),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32, device=ids.device),
        "max_length": length,
    }
    for name in _LABELS:
        if name in batch:
            labels = batch[name]
            by_token = labels.shape == ids.shape and not labels.is_floating_point()
            made[name] = labels.new_zeros(1, length + extra) if by_token else labels[:1]
    return made
