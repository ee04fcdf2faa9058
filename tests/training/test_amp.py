"""fp16: float32 weights, autocast, a scaler whose state survives, overflows left out."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.masks import Budget
from sensikernels.training import finetune
from sensikernels.training.loop import prepare
from tests.training.children import STEP, run


@pytest.mark.parametrize("packed", [True, False])
def test_fp16_trains_close_to_fp32(settings, still, tmp_path, packed):
    given = {"model": str(still), "packed": packed, "compare_dense": True, "lr": 1e-4}
    wide = finetune(settings(output=tmp_path / "wide", **given))
    narrow = finetune(settings(dtype="fp16", **given))
    assert narrow["skipped_steps"] == {"planned": 0, "dense": 0}
    for name in ("planned", "dense"):
        assert narrow["losses"][name] == pytest.approx(wide["losses"][name], abs=5e-3)
        assert narrow["losses"][name] != wide["losses"][name]
    assert narrow["saved_model"]["bit_equal"]


@pytest.mark.parametrize("place", ["runner", "dense"])
def test_an_overflow_moves_nothing_and_is_counted(settings, place):
    session = prepare(settings(dtype="fp16", method="dense", compare_dense=True))
    runner = getattr(session, place)
    batches = [part.batch for (part,) in session.data.steps(0)]
    batches = [session.data.padded(b) if place == "dense" else b for b in batches]
    runner.step(batches[0])
    before = {n: p.detach().clone() for n, p in runner.model.named_parameters()}
    group = dict(runner.run.optimizer.param_groups[0])
    runner.amp.scaler.update(3e38)
    runner.step(batches[1])
    assert (runner.amp.skipped, runner.run.step) == (1, 2)
    assert all(torch.equal(p, before[n]) for n, p in runner.model.named_parameters())
    assert runner.run.optimizer.param_groups[0].get("line") == group.get("line")
    assert all(p.grad is None for p in runner.model.parameters())
    rate = runner.run.optimizer.param_groups[0]["lr"]
    runner.amp.scaler.update(1024.0)
    runner.step(batches[2])
    assert runner.run.optimizer.param_groups[0]["lr"] == rate  # as transformers counts
    assert runner.amp.skipped == 1


def test_a_killed_run_resumes_to_the_bit(settings, tmp_path):
    given = {"dtype": "fp16", "checkpoint_every": 2, "epochs": 2, "gradient_accumulation_steps": 2}
    whole = settings(output=tmp_path / "whole", **given)
    assert run(whole) == 0
    assert run(settings(**given), (STEP, 5)) == -signal.SIGKILL
    again = settings(resume=True, **given)
    assert run(again) == 0
    reports = [json.loads((s.output / "report.json").read_text()) for s in (whole, again)]
    assert reports[0]["losses"] == reports[1]["losses"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parallel": "fsdp"}, "parallel: expected ddp for dtype fp16"),
        ({"budget": Budget(step_time=0.5)}, "dtype: expected fp32 or bf16 for a step_time budget"),
    ],
)
def test_refusals(settings, given, said):
    with pytest.raises(UsageError, match=said):
        settings(dtype="fp16", **given)
