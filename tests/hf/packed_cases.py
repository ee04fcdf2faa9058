"""Models, batches and comparisons for the tests of packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf.conftest import TASKS, make_model

transformers = pytest.importorskip("transformers")

HEADS = {**TASKS, "language": transformers.BertForMaskedLM}
SMALL = {"neurons": 4, "dimensions": 2}
LENGTHS = {
    "ragged": [7, 1, 12, 3],
    "one sentence": [5],
    "one token": [1],
    "every length": list(range(1, 14)),
    "full": [9, 9, 9],
}


def make(task: str = "classification", **named: Any) -> nn.Module:
    model: nn.Module
    if task != "language":
        return make_model(task, **named)
    host = make_model(**named)
    torch.manual_seed(1)
    model = transformers.BertForMaskedLM(host.config)
    model.load_state_dict(host.state_dict(), strict=False)
    return model


def draw(task: str, lengths: list[int], *, pairs: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """HuggingFace's padded batch; padding holds garbage ids."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(lengths), max(lengths)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids(97, rows, length), "attention_mask": mask}
    if pairs:
        second = torch.arange(length) >= torch.tensor(lengths)[:, None] // 2
        batch["token_type_ids"] = second.long() * mask
    if task == "answering":
        at = torch.tensor([n - 1 for n in lengths])
        return batch | {"start_positions": at // 2, "end_positions": at}
    if task == "language":
        wanted = (ids(3, rows, length) == 1) & (mask == 1)
        wanted[:, 0] = True
        return batch | {"labels": torch.where(wanted, ids(97, rows, length), -100)}
    return batch | {"labels": ids(3, rows) - 1}


def pack(batch: dict[str, Tensor], multiple: int = 8, *, fill: int = 1) -> dict[str, Any]:
    """The packed form of a padded batch, rows of no sequence filled with ``fill``."""
    mask = batch["attention_mask"] == 1
    lengths = mask.sum(1)
    extra = -int(lengths.sum()) % multiple
    position = torch.arange(mask.shape[1]).expand_as(mask)

    def flat(value: Tensor, filler: int) -> Tensor:
        return torch.cat([value[mask], torch.full((extra,), filler)])[None]

    out: dict[str, Any] = {
        "input_ids": flat(batch["input_ids"], fill),
        "position_ids": flat(position, fill % 50),
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_length": int(lengths.max()),
    }
    if "token_type_ids" in batch:
        out["token_type_ids"] = flat(batch["token_type_ids"], fill % 2)
    for name in ("labels", "start_positions", "end_positions"):
        if name in batch:
            per_token = batch[name].shape == mask.shape
            out[name] = flat(batch[name], -100) if per_token else batch[name]
    return out


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, grads(model)


def same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert float((got[name] - value).abs().max()) <= tolerance, name


def same_on_average(
    model: nn.Module, batch: dict[str, Tensor], change: Callable[[nn.Module], object]
) -> None:
    """Losses with dropout have one mean and spread before ``change(model)`` and after it."""

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.stack([model(**batch).loss for _ in range(150)])

    theirs = losses()
    change(model)
    ours = losses()
    error = float((theirs.var() + ours.var()).sqrt()) / 150**0.5
    assert abs(float(theirs.mean() - ours.mean())) < 4 * error
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.4)
