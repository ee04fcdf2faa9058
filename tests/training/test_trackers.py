"""Trackers: what TensorBoard's own reader finds, also after a failure and a resume."""

from __future__ import annotations

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.training import finetune, trackers


def scalars(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(output / "trackers" / "tensorboard"))
    found.Reload()
    return {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}


def test_a_run_that_failed_is_closed_and_its_steps_go_on(settings):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    given = {"report_to": ("tensorboard",), "checkpoint_every": 2, "eval_steps": 2}

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(settings(**given), stop)
    asked = settings(**given, resume=True)
    report = finetune(asked)
    read = scalars(asked.output)
    assert [event.step for event in read["train/loss"]] == [1, 2, 3, 4, 5, 6]
    losses = [event.value for event in read["train/loss"]]
    assert losses == pytest.approx(report["losses"]["planned"], rel=1e-6)
    assert [event.step for event in read["eval/accuracy"]][-2:] == [4, 6]
    assert read["plan/flops_ratio"][0].value == pytest.approx(
        report["budget"]["flops_ratio_planned"]
    )
    assert {"train/learning_rate", "train/step_ms", "train/tokens_per_s"} <= read.keys()
    assert report["settings"]["report_to"] == ["tensorboard"]


def test_refusals(settings, monkeypatch):
    with pytest.raises(UsageError, match="report_to: expected one of mlflow, tensorboard, wandb"):
        settings(report_to=("comet",))
    with pytest.raises(UsageError, match="report_to: expected a sequence of names"):
        settings(report_to="wandb")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb installed, got none: pip install wandb"):
        settings(report_to=("wandb",))
