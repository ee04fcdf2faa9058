"""The method's phases inside a real ``transformers.Trainer``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sensikernels import SubsetAdamW, compact
from sensikernels._core.errors import CheckpointError, UsageError
from sensikernels.data import DataCollatorPacked
from sensikernels.hf import (
    applied,
    load_model,
    load_tokenizer,
    packing_of,
    to_padded,
    training_flops,
    use_packed,
)
from sensikernels.masks import Budget, StepCosts
from sensikernels.methods import METHODS
from sensikernels.training import SensiCallback
from tests.methods.small import OPTIONS
from tests.training.tiny import trainer_rows

ROWS, BATCH = 96, 8
STEPS = ROWS // BATCH


@pytest.fixture
def make(tiny, tmp_path):
    """A Trainer over the tiny model with a callback, and the callback."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(tiny)
    rows = trainer_rows(tokenizer, ROWS)

    def trainer(callback, *, name="out", optimizer=None, packing=None, dropout=0.1, **given):
        torch.manual_seed(0)
        model = load_model(tiny, labels=2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        if packing is not None:
            use_packed(model)
        collator = DataCollatorPacked(pad_token_id=tokenizer.pad_token_id)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            num_train_epochs=1,
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=BATCH,
            logging_steps=1,
            save_steps=3,
            disable_tqdm=True,
            seed=0,
            **given,
        )
        made = None if optimizer is None else optimizer(model.parameters())
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            callbacks=[callback],
            data_collator=collator if packing == "packed" else DataCollatorWithPadding(tokenizer),
            optimizers=(made, None),
        )

    return trainer


def callback(**given):
    return SensiCallback(
        "sensi-bert", budget=Budget(flops=0.6), warmup=0.35, rewarm=0.5, ranking_rows=64, **given
    )


def history(trainer):
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


def test_trims_goes_on_and_compacts_bit_equal(make, tmp_path):
    watcher = callback()
    trainer = make(watcher)
    trainer.floating_point_ops = watcher.floating_point_ops
    trainer.train()
    model = trainer.model

    assert applied(model) is not None
    assert watcher.plan.flops_ratio <= 0.6
    assert watcher.run.events == ["step 4: trimmed to FLOPs " + f"x{watcher.plan.flops_ratio:.4f}"]
    live = {id(p) for p in model.parameters()}
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == live
    losses = history(trainer)
    assert len(losses) == STEPS
    assert trainer.state.total_flos > 0

    small = compact(model).eval()
    small.save_pretrained(tmp_path / "small")
    loaded = load_model(tmp_path / "small", labels=2).eval()
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(small(**batch).logits, loaded(**batch).logits)
        torch.testing.assert_close(small(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("optimizer", [SubsetAdamW, torch.optim.SGD])
def test_the_rate_rises_again_after_the_trim(make, optimizer):
    """The optimizer sees the Trainer's schedule times the method's factor; the Trainer its own."""
    trainer = make(callback(), optimizer=lambda p: optimizer(p, lr=1e-3))
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"])
    )
    trainer.train()
    plain = [1e-3 * (1 - step / STEPS) for step in range(STEPS)]
    rising = [min(1, max(step - 3, 0) / 6) if step >= 4 else 1 for step in range(STEPS)]
    assert seen == pytest.approx(
        [rate * factor for rate, factor in zip(plain, rising, strict=True)], rel=1e-12
    )
    shown = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert shown == pytest.approx(plain, rel=1e-12)


def test_flops_are_those_that_run(make):
    watcher = callback()
    trainer = make(watcher)
    trainer.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    counted = training_flops(trainer.model, batch)
    assert watcher.floating_point_ops(batch) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_a_packed_model_trains_the_same(make, packing):
    stock = make(callback(), name="stock", dropout=0.0)
    stock.train()
    watcher = callback()
    trainer = make(watcher, packing=packing, dropout=0.0)
    trainer.floating_point_ops = watcher.floating_point_ops
    trainer.train()
    model = trainer.model
    assert packing_of(model).cls_only
    assert watcher.plan.flops_ratio <= 0.6
    ours, theirs = history(trainer), history(stock)
    assert [ours[i] for i in range(1, 5)] == pytest.approx(
        [theirs[i] for i in range(1, 5)], rel=1e-4
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert ("cu_seqlens" in batch) == (packing == "packed")
    counted = training_flops(model, batch)
    assert watcher.floating_point_ops(batch) == pytest.approx(counted, rel=1e-6)
    logits = compact(model).eval()(**to_padded(batch)).logits
    torch.testing.assert_close(logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_a_packed_model_evaluates_the_same(make, packing):
    stock, trainer = make(callback()), make(callback(), packing=packing)
    rows = stock.train_dataset[:20]
    wanted, got = stock.evaluate(rows), trainer.evaluate(rows)
    assert got["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    ours, theirs = trainer.predict(rows), stock.predict(rows)
    np.testing.assert_allclose(ours.predictions, theirs.predictions, atol=1e-5)
    assert ours.label_ids.tolist() == theirs.label_ids.tolist()


@pytest.mark.parametrize("method", ["dense", "bitfit"])
def test_flops_of_packed_batches_are_those_that_run(make, method):
    watcher = SensiCallback(method)
    trainer = make(watcher, packing="packed")
    trainer.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    counted = training_flops(trainer.model, batch)
    tolerance = 1e-6 if method == "dense" else 0.02  # BitFit's lowest layer has no input gradient
    assert watcher.floating_point_ops(batch) == pytest.approx(counted, rel=tolerance)


def test_ranking_leaves_the_trainers_order_and_dropout_alone(make):
    trainer = make(callback())
    trainer.train()
    other = make(SensiCallback("dense"), name="dense")
    other.train()
    ours, theirs = history(trainer), history(other)
    assert [ours[i] for i in range(1, 5)] == [theirs[i] for i in range(1, 5)]
    assert ours[5] != theirs[5]


@pytest.mark.parametrize("step", [3, 6])
def test_resumes_before_and_after_the_trim(make, tmp_path, step):
    whole = make(callback())
    whole.train()

    folder = tmp_path / "out" / f"checkpoint-{step}"
    watcher = callback()
    trainer = make(watcher, name="again")
    watcher.prepare(trainer.model, folder)
    assert (applied(trainer.model) is not None) == (step > 4)
    trainer.train(resume_from_checkpoint=str(folder))
    assert history(trainer) == history(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "method", ["autofreeze", "child-tuning", "dsee", "fewer-layers", "lisa", "lora", "s2ft", "sift"]
)
def test_every_kind_of_method_resumes(make, tmp_path, method):
    """Layers cut, frozen, swapped or added before the checkpoint; sums that are on the way."""
    budget = Budget(flops=0.6) if METHODS[method].needs_budget else None

    def begun(name):
        watcher = SensiCallback(method, budget=budget, ranking_rows=32, **OPTIONS.get(method, {}))
        trainer = make(watcher, name=name, optimizer=SubsetAdamW if method in MASKED else None)
        return watcher, trainer

    whole = begun("out")[1]
    whole.train()
    folder = tmp_path / "out" / "checkpoint-6"
    watcher, trainer = begun("again")
    watcher.prepare(trainer.model, folder)
    trainer.train(resume_from_checkpoint=str(folder))
    assert history(trainer) == history(whole)
    ours, theirs = trainer.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


MASKED = ("child-tuning",)
"""Methods whose masks an optimizer of this package must hold."""


def test_bitfit_and_dps_train_under_trainer(make):
    frozen = make(SensiCallback("bitfit"))
    frozen.train()
    moving = {n for n, p in frozen.model.named_parameters() if p.requires_grad}
    assert moving
    assert all("bias" in n or n.startswith("classifier") for n in moving)

    with pytest.raises(UsageError, match="SubsetAdamW"):
        make(SensiCallback("dps"), name="plain").train()
    clean = make(
        SensiCallback("dps", update_ratio=0.25), name="dps", optimizer=lambda p: SubsetAdamW(p)
    )
    clean.train()
    assert len(history(clean)) == STEPS


@pytest.mark.parametrize("packing", [None, "packed"])
def test_a_step_time_budget_is_met_by_the_clock(make, packing):
    saved = {"heads": {1: 10.0, 4: 0.0}, "neurons": {16: 20.0, 128: 0.0}}
    costs = StepCosts(
        device="cpu",
        dtype="float32",
        threads=1,
        tokens=100,
        layers=2,
        units={"heads": 4, "neurons": 128},
        dense_ms=100.0,
        saved={"inner": saved, "last": saved},
    )
    watcher = SensiCallback(
        "sensi-bert", budget=Budget(step_time=0.9), warmup=0.35, ranking_rows=64, costs=costs
    )
    trainer = make(watcher, packing=packing)
    trainer.train()
    facts = watcher.plan.origin["step_time"]
    assert facts["asked"] == 0.9
    assert facts["met"] > 0
    assert f"step time x{facts['met']:.3f}" in watcher.run.events[0]
    assert len(history(trainer)) == STEPS


def test_bad_use_is_told_at_once(make, tiny, tmp_path):
    with pytest.raises(UsageError, match="budget: expected one for sensi-bert"):
        SensiCallback("sensi-bert")
    with pytest.raises(UsageError, match="budget: expected none for bitfit"):
        SensiCallback("bitfit", budget=Budget(flops=0.5))
    watcher = callback()
    trainer = make(watcher)
    with pytest.raises(CheckpointError, match="state.json"):
        watcher.prepare(trainer.model, tmp_path)
    trainer.train()
    other = SensiCallback("sensi-bert", budget=Budget(flops=0.7), warmup=0.35, rewarm=0.5)
    with pytest.raises(CheckpointError, match="budget: expected"):
        other.prepare(load_model(tiny, labels=2), tmp_path / "out" / "checkpoint-6")
