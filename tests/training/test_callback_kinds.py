"""Any Trainer: streams, losses of its own, a second train, retries, best models, precisions."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels import SubsetAdamW, compact, restore
from sensikernels._core.errors import UsageError
from sensikernels.hf import applied, apply, sensitivity
from sensikernels.masks import Budget, plan
from sensikernels.training import SensiCallback
from tests.hf.conftest import make_model
from tests.hf.packed_cases import SMALL

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS, TRIM = 8, 2


def rows(count: int = 48, labels: str = "labels") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        length = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(5, 97, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, labels: index % 2})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch]
    rest = {k: torch.tensor([row[k] for row in batch]) for k in batch[0] if k != "input_ids"}
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)} | rest


def sensi(**named: Any) -> SensiCallback:
    given = {
        "budget": Budget(flops=0.7),
        "warmup": TRIM / STEPS,
        "ranking_rows": 16,
        "multiples": SMALL,
    } | named
    return SensiCallback("sensi-bert", **given)


@pytest.fixture
def make(tmp_path: Any) -> Any:
    def trainer(
        callback: Any,
        *,
        kind: Any = None,
        dataset: Any = None,
        model: Any = None,
        optimizers: Any = (None, None),
        evaluated: Any = None,
        metrics: Any = None,
        loss: Any = None,
        **named: Any,
    ) -> Any:
        given = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 1e-3,
        } | named
        return (kind or transformers.Trainer)(
            model=model or make_model(),
            args=transformers.TrainingArguments(**given),
            train_dataset=rows() if dataset is None else dataset,
            eval_dataset=evaluated,
            data_collator=collate,
            compute_metrics=metrics,
            compute_loss_func=loss,
            callbacks=[callback] if callback else [],
            optimizers=optimizers,
        )

    return trainer


def trimmed(trainer: Any) -> None:
    swap = applied(trainer.model)
    assert swap is not None
    assert swap.plan.flops_ratio <= 0.7
    live = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == live
    compact(trainer.model)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows())


class Once(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.left = iter(rows())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.left


def test_a_stream_is_ranked_by_its_first_rows(make: Any) -> None:
    watcher = sensi()
    trainer = make(watcher, dataset=Stream())
    trainer.train()
    trimmed(trainer)
    batches = [collate(rows()[:16])]
    model = make_model()
    scores = sensitivity(model, batches)
    assert scores.rows == watcher.run.scores.rows == 16


def test_a_datasets_stream(make: Any) -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(rows()).to_iterable_dataset()
    trainer = make(sensi(), dataset=stream)
    trainer.train()
    trimmed(trainer)


def test_a_stream_that_is_read_once_is_refused_at_once(make: Any) -> None:
    trainer = make(sensi(), dataset=Once())
    with pytest.raises(UsageError, match="train_dataset: expected a stream that can be read twice"):
        trainer.train()
    assert trainer.state.global_step == 0


class OwnLabels(transformers.Trainer):  # type: ignore[misc]
    """Labels of another name and a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        given = dict(inputs)
        targets = given.pop("targets")
        logits = model(**given).logits
        loss = nn.functional.cross_entropy(logits, targets)
        return (loss, {"logits": logits}) if named.get("return_outputs") else loss


def own_loss(model: Any, batch: Any) -> Tensor:
    given = dict(batch)
    targets = given.pop("targets")
    return nn.functional.cross_entropy(model(**given).logits, targets)


def test_labels_of_another_name_are_refused_at_once_or_ranked_by(make: Any) -> None:
    given = {"kind": OwnLabels, "dataset": rows(labels="targets"), "remove_unused_columns": False}
    trainer = make(sensi(), **given)
    with pytest.raises(UsageError, match="got none for a batch of .*targets"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = make(sensi(compute_loss=own_loss), **given)
    trainer.train()
    trimmed(trainer)


def test_rows_without_labels_are_refused_at_once(make: Any) -> None:
    bare = [{"input_ids": row["input_ids"]} for row in rows()]
    trainer = make(sensi(), dataset=bare, loss=lambda out, labels, **_: out.logits.sum())
    with pytest.raises(UsageError, match="batches: expected a loss in the model's output"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_extra_columns_are_dropped_as_the_trainer_drops_them(make: Any) -> None:
    dataset = [row | {"idx": i, "text": "a"} for i, row in enumerate(rows())]
    plain = make(sensi(), dataset=[{k: v for k, v in r.items() if k != "text"} for r in dataset])
    plain.train()
    trimmed(plain)


def test_a_smoothed_loss_is_ranked_by_smoothed(make: Any) -> None:
    values = []
    for factor in (0.0, 0.3):
        watcher = sensi(warmup=0.0)
        trainer = make(watcher, label_smoothing_factor=factor)
        trainer.train()
        trimmed(trainer)
        values.append(watcher.run.scores.values["layer.0.neurons"])
    assert not torch.allclose(values[0], values[1], rtol=0.1, atol=0)
    model = make_model()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:16].sort().values
    batch = collate([rows()[i] for i in chosen])

    def loss(one: nn.Module, given: Any) -> Tensor:
        value: Tensor = smooth(one(**given).logits, given["labels"])
        return value

    wanted = sensitivity(model, [batch], compute_loss=loss).values["layer.0.neurons"]
    torch.testing.assert_close(values[1], wanted, rtol=1e-3, atol=0)


def test_a_second_train_goes_on_with_the_plan(make: Any) -> None:
    watcher = sensi()
    trainer = make(watcher)
    trainer.train()
    before = applied(trainer.model)
    trainer.train()
    assert applied(trainer.model) is before
    assert watcher.plan is before.plan
    trimmed(trainer)
    again = sensi()
    trainer.remove_callback(watcher)
    trainer.add_callback(again)
    trainer.train()
    assert again.plan is before.plan
    other = sensi(budget=Budget(flops=0.9))
    trainer.remove_callback(again)
    trainer.add_callback(other)
    with pytest.raises(UsageError, match=r"one of sensi-bert for .*\(restore first\)"):
        trainer.train()
    restore(trainer.model, optimizer=trainer.optimizer)
    trainer.train()
    assert applied(trainer.model).plan.budget == Budget(flops=0.9)


@pytest.mark.parametrize("method", ["bitfit", "freeze", "dps"])
def test_a_second_train_of_every_method(make: Any, method: str) -> None:
    model = make_model()
    optimizer = SubsetAdamW(model.parameters(), lr=1e-3) if method == "dps" else None
    options = {"share": 0.5} if method == "freeze" else {}
    watcher = SensiCallback(method, **options)
    trainer = make(watcher, model=model, optimizers=(optimizer, None))
    trainer.train()
    trainer.train()
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_another_plan_in_force_is_refused_at_once(make: Any) -> None:
    model = make_model()
    apply(
        model,
        plan(
            sensitivity(model, [], "magnitude"), Budget(flops=0.8), multiples=SMALL, minimums=SMALL
        ),
    )
    trainer = make(SensiCallback("bitfit"), model=model)
    with pytest.raises(UsageError, match="expected no plan, or one of bitfit"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_retry_with_smaller_batches(make: Any, at: int) -> None:
    class OutOfMemory(transformers.Trainer):  # type: ignore[misc]
        done = False

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            if self.state.global_step == at and not self.done:
                self.done = True
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(*arguments, **named)

    trainer = make(sensi(), kind=OutOfMemory, auto_find_batch_size=True)
    trainer.train()
    assert trainer.done
    trimmed(trainer)


@pytest.mark.parametrize("early", [True, False])
def test_the_best_model_is_the_best_trimmed_one(make: Any, early: bool, caplog: Any) -> None:
    calls: list[int] = []

    def metrics(_: Any) -> dict[str, float]:
        calls.append(1)
        return {"score": float(-len(calls) if early else len(calls))}

    trainer = make(
        sensi(warmup=0.5),
        evaluated=rows(16),
        metrics=metrics,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        model=make_model(initializer_range=0.3),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "best-model loading counts from here on" in caplog.text
    step = int(trainer.state.best_model_checkpoint.split("-")[-1])
    assert step == (6 if early else 8)
    then = [
        e["eval_loss"]
        for e in trainer.state.log_history
        if e.get("step") == step and "eval_loss" in e
    ]
    assert math.isclose(trainer.evaluate()["eval_loss"], then[0], rel_tol=1e-5)
    trimmed(trainer)


@pytest.mark.parametrize("packing", [False, True])
def test_an_evaluation_in_bfloat16(make: Any, packing: bool) -> None:
    model = make_model()
    if packing:
        apply(model, features=("dropout", "packed", "cls", "fused"))
    trainer = make(sensi(), evaluated=rows(16), bf16_full_eval=True, model=model)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    small = compact(trainer.model)
    assert next(small.parameters()).dtype == torch.bfloat16
    batch = collate(rows(4))
    ours, wanted = small.eval()(**batch).logits, trainer.model.eval()(**batch).logits
    torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.05)
    restore(trainer.model)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_torch", "sgd", "rmsprop", "adagrad"])
def test_optimizers_of_the_trainer(make: Any, optimizer: str) -> None:
    trainer = make(sensi(), optim=optimizer)
    trainer.train()
    trimmed(trainer)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "named",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.1},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_empty_cache_steps": 1},
        {"eval_on_start": True},
    ],
)
def test_other_arguments(make: Any, named: dict[str, Any]) -> None:
    trainer = make(sensi(), evaluated=rows(8), **named)
    trainer.train()
    trimmed(trainer)


def test_an_encoder_that_cannot_be_ranked_is_refused_at_once(make: Any) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AlbertConfig(
        vocab_size=97, embedding_size=16, intermediate_size=32, **sizes
    )
    model = transformers.AlbertForSequenceClassification(config)
    trainer = make(sensi(), model=model)
    with pytest.raises(UsageError, match="model: expected an encoder laid out like BERT's"):
        trainer.train()
    assert trainer.state.global_step == 0
