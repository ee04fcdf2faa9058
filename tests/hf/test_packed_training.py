"""200 steps on packed tokens follow HuggingFace's loss: dropout 0, float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sensikernels.data import Batches, collate_packed, embedded_model_path, encode, load
from sensikernels.hf import load_model, load_tokenizer, quiet, use_packed
from sensikernels.optim import SubsetAdamW

STEPS, ROWS = 200, 16


@pytest.mark.slow
def test_the_loss_is_huggingfaces(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--glue-data", default=None)
    task = "demo" if folder is None else "sst2"
    examples = load(task, data_dir=folder, split="train", max_samples=STEPS * ROWS)
    encoded = encode(examples, load_tokenizer(embedded_model_path()))
    with quiet():
        theirs: Any = load_model(embedded_model_path(), labels=2).train()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = copy.deepcopy(theirs)
    use_packed(ours)
    optimizers = [
        torch.optim.AdamW(theirs.parameters(), lr=2e-5),
        SubsetAdamW(ours.parameters(), lr=2e-5, weight_decay=0.01),
    ]
    worst = 0.0
    order = Batches(encoded, batch_size=ROWS)
    for padded, rows in zip(order, list(order.order)[:STEPS], strict=False):
        packed = collate_packed([encoded[i] for i in rows], pad_token_id=encoded.pad_token_id)
        losses = []
        for model, batch, optimizer in zip(
            (theirs, ours), (padded, packed), optimizers, strict=True
        ):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        worst = max(worst, abs(losses[1] / losses[0] - 1))
    print(f"largest relative difference in {STEPS} steps: {worst:.2e}")  # noqa: T201
    assert worst <= 1e-4
