"""Evaluations between epochs, early stopping and the best model, killed in between or not."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from sensikernels._core.errors import UsageError
from sensikernels.training import finetune
from sensikernels.training.runner import Runner
from sensikernels.training.stopping import Best
from tests.training.children import STEP, run
from tests.training.reports import assert_same_end


def test_patience_as_transformers_counts_it():
    """A small gain is a new best and yet none that the run waits for."""
    best = Best(patience=2, threshold=0.125)
    taken = [(best.take(n, v), best.waited) for n, v in enumerate([0.25, 0.5, 0.5625, 0.5], 1)]
    assert taken == [(True, 0), (True, 0), (True, 1), (False, 2)]
    assert best.exhausted
    assert best.to_json() == {"step": 3, "value": 0.5625}
    again = Best(patience=2, threshold=0.125)
    again.load_state(best.state(), 4)
    assert again == best


def test_hand_made_patience():
    best = Best(patience=2)
    assert [(best.take(n, v), best.exhausted) for n, v in enumerate([0.5, 0.7, 0.6, 0.7], 1)] == [
        (True, False),
        (True, False),
        (False, False),
        (False, True),
    ]
    assert best.step == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_steps": -1}, "eval_steps: expected at least 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: expected at least 1"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold: expected none without"),
    ],
)
def test_refusals(settings, given, said):
    with pytest.raises(UsageError, match=said):
        settings(**given)


def test_evaluations_between_epochs(settings):
    report = finetune(settings(eval_steps=4, epochs=2, compare_dense=True))
    assert report["evaluated_at"] == [4, 6, 8, 12]
    assert len(report["metrics"]["planned"]) == len(report["metrics"]["dense"]) == 4


def scripted(monkeypatch, values):
    """Have the method's evaluations give these values; returns its weights at each."""
    evaluate, seen = Runner.evaluate, {}

    def told(self, data):
        metrics = evaluate(self, data)
        if self.name != "dense baseline":
            metrics["accuracy"] = values[len(self.epochs) - 1]
            seen[self.run.step] = {n: v.clone() for n, v in self.model.state_dict().items()}
        return metrics

    monkeypatch.setattr(Runner, "evaluate", told)
    return seen


@pytest.mark.parametrize("method", ["dense", "bitfit"])
def test_a_run_stops_early_and_saves_its_best(settings, monkeypatch, method):
    seen = scripted(monkeypatch, [0.5, 0.8, 0.7, 0.8, 0.9, 0.9])
    given = {"eval_steps": 1, "early_stopping_patience": 2, "keep_best": True, "method": method}
    asked = settings(**given, compare_dense=True)
    report = finetune(asked)
    assert report["stopped_early_at"] == report["steps"]["total"] == 4
    assert report["best"]["planned"] == {"step": 2, "value": 0.8}
    assert report["metric"]["value"] == 0.8
    assert len(report["losses"]["dense"]) == 4
    assert "step 4: stopped early" in report["events"]
    saved = load_file(asked.output / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in seen[2].items() if name in saved)
    assert any(not torch.equal(value, seen[4][name]) for name, value in saved.items())


def test_evaluations_before_the_trim_do_not_count(settings, monkeypatch):
    scripted(monkeypatch, [0.99, 0.98, 0.97, 0.6, 0.7, 0.5])
    given = {"eval_steps": 1, "early_stopping_patience": 2, "keep_best": True}
    report = finetune(settings(options={"warmup": 0.5}, **given))
    assert report["best"]["planned"] == {"step": 5, "value": 0.7}
    assert report["stopped_early_at"] is None
    assert report["saved_model"]["bit_equal"]


@pytest.mark.parametrize("every", [1, 4])
def test_a_killed_run_keeps_the_same_best_and_stops_at_the_same_step(settings, tmp_path, every):
    given = {"eval_steps": 2, "keep_best": True, "epochs": 2, "early_stopping_patience": 3}
    given |= {"options": {"warmup": 0.1}, "checkpoint_every": every, "lr": 3e-3}
    whole = settings(output=tmp_path / "whole", **given)
    assert run(whole) == 0
    total = json.loads((whole.output / "report.json").read_text())["steps"]["total"]
    assert run(settings(**given), (STEP, total - 1)) == -signal.SIGKILL
    again = settings(resume=True, **given)
    assert run(again) == 0
    assert_same_end(again.output, whole.output)
