"""Milliseconds of the finished models' forward, a row at a time and 32 at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.products import float32_products
from sensikernels.bench.timing import interleave
from sensikernels.hf import load_model, quiet
from sensikernels.training.config import DTYPES, Settings
from sensikernels.training.distributed import device_kind

ROWS = (1, 32)
_ROUNDS = 15


def latencies(
    folders: Mapping[str, Path], settings: Settings, report: Mapping[str, Any]
) -> dict[str, dict[int, float]]:
    """Median milliseconds by contestant and rows, all rows of the data's mean length, in turn.

    Models are loaded as a user would, plain and eager, in the run's dtype, on its device;
    ``report`` says which head they have.
    """
    labels, length = report["labels"], max(2, round(report["data"]["mean_length"]))
    device = device_kind(settings)
    with quiet():
        models = {name: _load(folder, settings, labels, device) for name, folder in folders.items()}
    words = min(int(model.config.vocab_size) for model in models.values())
    found: dict[str, dict[int, float]] = {name: {} for name in models}
    with float32_products(device), torch.inference_mode():
        for rows in ROWS:
            ids = torch.randint(0, words, (rows, length), device=device)
            runs = {name: _forward(model, ids) for name, model in models.items()}
            times = interleave(runs, rounds=_ROUNDS, warmup=3, device=device, clock="wall")
            for name, timing in times.items():
                found[name][rows] = timing.median_ms
    return found


def _load(folder: Path, settings: Settings, labels: Mapping[str, Any], device: str) -> Any:
    alone = 2 if labels["kind"] == "answers" else 1
    model = load_model(
        folder,
        labels=len(labels["names"]) or alone,
        dtype=DTYPES[settings.dtype],
        head=labels["kind"],
        problem=labels["problem"],
    )
    return model.to(device).eval()


def _forward(model: Any, ids: Tensor) -> Callable[[], object]:
    return partial(model, input_ids=ids, attention_mask=torch.ones_like(ids))
