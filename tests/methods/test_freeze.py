"""Freezing the lowest layers: what trains, what it costs, and what a kept prefix changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import encoder_layers, restore, training_flops, uncached, use_packed
from sensikernels.masks import Geometry
from sensikernels.methods import Freeze, Run
from sensikernels.training.memory import resident_bytes
from sensikernels.world import World
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make


def make_run(**named: int) -> Run:
    model = make_model(num_hidden_layers=4, dropout=0.2)
    return Run(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        max_steps=10,
        batches=lambda: [make_batch()],
        geometry=Geometry.uniform(9),
        **named,  # type: ignore[arg-type]
    )


def test_what_lies_below_does_not_move_and_flops_are_as_planned() -> None:
    run = make_run()
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    Freeze(share=0.5).begin(run)
    assert run.plan is not None
    batch = make_batch()
    run.model(**batch).loss.backward()
    run.optimizer.step()
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    low = ("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.")
    assert {n for n in before if not n.startswith(low)} == set(run.plan.trainable or ())
    assert moved <= set(run.plan.trainable or ())
    assert "bert.encoder.layer.2.attention.self.query.weight" in moved
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert counted == pytest.approx(run.plan.flops_planned, rel=0.03)
    restore(run.model)
    assert all(p.requires_grad for p in run.model.parameters())


def test_dropout_that_no_module_holds_is_off_below_too() -> None:
    run = make_run()
    run.model = make("modernbert", "ForSequenceClassification", attention_dropout=0.3)
    use_packed(run.model)
    run.optimizer = torch.optim.AdamW(run.model.parameters())
    Freeze(share=0.5, cache=True).begin(run)
    layers = encoder_layers(run.model)
    half = round(0.5 * len(layers))
    rates = [layer.attention.attention_dropout for layer in layers]
    assert rates == [0.0] * half + [0.3] * (len(layers) - half)
    run.model.train()(**draw("ForSequenceClassification", "modernbert")).loss.backward()


def test_a_kept_prefix_drops_nothing_and_counts_as_memory() -> None:
    run = make_run()
    use_packed(run.model)
    held = resident_bytes(run.model, run.optimizer)
    Freeze(share=0.5, cache=True).begin(run)
    rates = {n: m.p for n, m in run.model.named_modules() if isinstance(m, nn.Dropout)}
    assert {n for n, p in rates.items() if p == 0} == {
        n
        for n in rates
        if n.startswith(("bert.embeddings", "bert.encoder.layer.0.", "bert.encoder.layer.1."))
    }
    batch = make_batch()
    cost = training_flops(run.model, batch)
    cache = run.model.bert.prefix_cache  # type: ignore[union-attr]
    assert cache.misses == len(batch["input_ids"])  # type: ignore[union-attr]
    tokens = int(batch["attention_mask"].sum())
    assert resident_bytes(run.model, run.optimizer) == held + tokens * 32 * 4
    assert training_flops(run.model, batch) < cost
    plain = make_run()
    use_packed(plain.model)
    Freeze(share=0.5).begin(plain)
    with uncached(run.model):
        assert training_flops(run.model, batch) == training_flops(plain.model, batch)
    assert copy.deepcopy(run.model).bert.prefix_cache is None  # type: ignore[union-attr]


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    with pytest.raises(UsageError, match=r"share: expected a share in \(0, 1\), got 1"):
        Freeze(share=1)
    few, two = make_run(), make_run(world=World(size=2))
    with pytest.raises(UsageError, match="share: expected at least one layer's, got 0.1"):
        Freeze(share=0.1).begin(few)
    with pytest.raises(UsageError, match="cache: expected one process, got 2"):
        Freeze(cache=True).begin(two)
    padded = make_run()
    with pytest.raises(UsageError, match="cache: expected packed tokens, got padded ones"):
        Freeze(cache=True).begin(padded)
    for run in (few, two, padded):
        assert all(p.requires_grad for p in run.model.parameters())
        assert run.plan is None
