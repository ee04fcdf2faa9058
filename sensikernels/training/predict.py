"""A model's outputs on the development rows, and what they are scored by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels.training.data import Data
from sensikernels.world import ALONE, World

LABELS = ("labels", "start_positions", "end_positions")


@torch.no_grad()
def predict(model: nn.Module, data: Data, world: World = ALONE) -> tuple[Tensor, Any]:
    """Logits float32 ``[rows, labels]`` and labels of the development rows, on the CPU.

    For words and spans logits are ``[tokens, labels]``, of all rows' tokens end to end, and in
    place of labels comes what ``data.truth`` gives. ``world``: its processes share the batches,
    and all return all.
    """
    training = model.training
    model.eval()
    encoded: Any = data.dev.dataset
    made = []
    for batch in data.evaluated(world):
        truth = [batch.pop(name).cpu() for name in LABELS if name in batch]
        made.append((_scores(model(**batch), batch, encoded.per), truth[0]))
    model.train(training)
    logits, labels = zip(*world.interleave(made, len(data.dev)), strict=True)
    return torch.cat(logits), torch.cat(labels) if encoded.per == "row" else data.truth()


def _scores(out: Any, batch: Mapping[str, Tensor], per: str) -> Tensor:
    if per == "row":
        logits: Tensor = out.logits.float().cpu()
        return logits
    spans = per == "span"
    scores: Tensor = torch.stack([out.start_logits, out.end_logits], -1) if spans else out.logits
    return scores.float()[batch["attention_mask"].bool()].cpu()
