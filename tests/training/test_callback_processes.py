"""A stock Trainer under several processes: the callback's plan is everywhere, DDP follows it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.masks import Budget, Plan
from sensikernels.training import SensiCallback
from tests.training.children import _server
from tests.training.processes import free_port, place
from tests.training.tiny import trainer_rows

ROWS, GLOBAL_BATCH = 96, 8
METHODS: dict[str, dict[str, Any]] = {
    "sensi-bert": {"budget": Budget(flops=0.6), "warmup": 0.35},
    "at once": {"method_": "sensi-bert", "budget": Budget(flops=0.6), "warmup": 0.0},
    "bitfit": {},
    "dps": {"update_ratio": 0.25},
}


def _train(
    rank: int, size: int, port: int, model: Path, output: Path, name: str, given: dict[str, Any]
) -> None:
    """A user's script in one process of ``size``; it leaves its findings as JSON."""
    os.environ |= place(rank, size, port) if size > 1 else {}
    torch.set_num_threads(1)
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from sensikernels import SubsetAdamW
    from sensikernels.data import DataCollatorPacked
    from sensikernels.hf import load_model, load_tokenizer, use_packed

    tokenizer = load_tokenizer(model)
    rows = trainer_rows(tokenizer, ROWS)
    packed, resumed = given.pop("packed", False), given.pop("resume", None)
    torch.manual_seed(0)
    stock = load_model(model, labels=2)
    if packed:
        use_packed(stock)
    options = METHODS[name]
    callback = SensiCallback(**{"method_": name, "ranking_rows": 96, **options})
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=GLOBAL_BATCH
        // size
        // given.get("gradient_accumulation_steps", 1),
        logging_steps=1,
        save_steps=3,
        disable_tqdm=True,
        seed=0,
        **given,
    )
    optimizer = SubsetAdamW(stock.parameters(), lr=5e-5) if name == "dps" else None
    collator = DataCollatorPacked() if packed else DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model=stock,
        args=arguments,
        train_dataset=rows,
        callbacks=[callback],
        data_collator=collator,
        optimizers=(optimizer, None),
    )
    callback.attach(trainer)
    if resumed is not None:
        callback.prepare(stock, resumed)
    trainer.train(resume_from_checkpoint=resumed)
    plan = callback.plan
    assert plan is not None
    masks = {**plan.weight_masks, **plan.update_masks}
    found = {
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "grad_norms": [e["grad_norm"] for e in trainer.state.log_history if "loss" in e],
        "kept": {n: m.grid.int().flatten().tolist() for n, m in masks.items()},
        "events": callback.run.events if callback.run else [],
        "weights": float(sum(p.double().abs().sum() for p in stock.parameters())),
        "wrapped": type(trainer.model_wrapped).__name__,
    }
    (output / f"rank{rank}.json").write_text(json.dumps(found))


def train(
    model: Path, output: Path, name: str, size: int = 1, **given: Any
) -> list[dict[str, Any]]:
    """Findings of every process, by rank."""
    output.mkdir(exist_ok=True)
    port = free_port()
    children = [
        _server.Process(target=_train, args=(rank, size, port, model, output, name, dict(given)))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0] * size
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(size)]


def assert_alike(one: dict[str, Any], many: list[dict[str, Any]], steps: int | None = None) -> None:
    for own in many:
        assert own["kept"] == many[0]["kept"]
        assert own["events"] == many[0]["events"]
        assert own["weights"] == many[0]["weights"]
        assert own["wrapped"] == "DistributedDataParallel"
    first, start = many[0], -steps if steps else None
    assert first["losses"] == pytest.approx(one["losses"][start:], rel=1e-4)
    assert first["grad_norms"] == pytest.approx(one["grad_norms"][start:], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sensi-bert", {}),
        ("at once", {"packed": True}),
        pytest.param("sensi-bert", {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        ("bitfit", {}),
        pytest.param("dps", {}, marks=pytest.mark.slow),
    ],
    ids=["padded", "packed", "accumulated", "bitfit", "dps"],
)
def test_two_processes_lose_what_one_does(still, tmp_path, name, given):
    (one,) = train(still, tmp_path / "one", name, **given)
    two = train(still, tmp_path / "two", name, 2, **given)
    assert_alike(one, two)
    assert len(one["losses"]) == ROWS // GLOBAL_BATCH
    if name != "dps":  # its last few entries hang on the order of sums
        assert two[0]["kept"] == one["kept"]


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_the_first_process_writes_a_checkpoint_that_two_resume(still, tmp_path, step):
    whole = train(still, tmp_path / "whole", "sensi-bert", 2)
    folder = tmp_path / "whole" / f"checkpoint-{step}"
    names = {path.name for path in (folder / "sensikernels").iterdir()}
    assert "state.json" in names
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    if step > 4:
        assert Plan.load(folder / "sensikernels" / "plan.json").weight_masks
    again = train(still, tmp_path / "again", "sensi-bert", 2, resume=str(folder))
    assert again[0]["kept"] == whole[0]["kept"]
    assert again[0]["losses"] == whole[0]["losses"]
    assert again[0]["weights"] == again[1]["weights"] == whole[0]["weights"]


def test_what_cannot_be_followed_is_refused(monkeypatch):
    from accelerate.utils import DistributedType

    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: sharded)
    with pytest.raises(UsageError, match="parallel: expected DDP or one process.*got FSDP"):
        SensiCallback("bitfit").on_train_begin(None, None, None)
