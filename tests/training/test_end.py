"""A trained model is kept whatever fails after its last step, and ``resume`` finishes the run."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sensikernels._core.errors import SensiError
from sensikernels._core.products import medium_rounds
from sensikernels.training import checkpoint, finetune
from sensikernels.training.finish import rounding
from sensikernels.training.runner import Runner
from tests.training.reports import assert_same_end

FINISH = "sensikernels.training.finish"


def fails(*_, **__):
    raise RuntimeError("broken\nin two lines")


@pytest.fixture
def whole(settings, tmp_path):
    asked = settings(output=tmp_path / "whole")
    finetune(asked)
    return asked.output


PLACES = {
    "sensikernels.training.picture.draw": {"model", "plan.json", "report.json"},
    f"{FINISH}.peak_mib": {"model", "plan.json", "report.json"},
    f"{FINISH}.load_model": {"model", "plan.json", "report.json"},
    f"{FINISH}.compact": {"plan.json", "report.json"},
    "sensikernels.masks.Plan.save": {"model", "report.json"},
    f"{FINISH}.build": {"model", "plan.json"},
    f"{FINISH}.write_json": {"model", "plan.json"},
    "sensikernels.training.loop.step_time_ratio": set(),
    "sensikernels.training.runner.predict": set(),
    "sensikernels.data.compute": set(),
}


@pytest.mark.parametrize("place", sorted(PLACES))
def test_what_fails_at_the_end_is_said_and_finished_later(settings, monkeypatch, whole, place):
    asked = settings()
    from sensikernels.training import end

    compute = end.compute
    monkeypatch.setattr(place, fails)
    if place.endswith("Plan.save"):  # the checkpoint's own goes through it too
        real = monkeypatch._setattr[-1][2]
        monkeypatch.setattr(
            place, lambda plan, path: fails() if path.parent == asked.output else real(plan, path)
        )
    monkeypatch.setattr(end, "compute", compute)
    with pytest.raises(SensiError, match="broken in two lines") as caught:
        finetune(asked)
    kept = checkpoint.latest(asked.output)
    assert kept is not None
    assert f"training is done and kept in {kept}: --resume goes on" in str(caught.value)
    names = {p.name for p in asked.output.iterdir()}
    assert PLACES[place] <= names
    if "report.json" in names:
        report = json.loads((asked.output / "report.json").read_text())
        assert any("broken in two lines" in line for line in report["failed"])
        assert len(report["losses"]["planned"]) == 6
    monkeypatch.undo()
    finetune(settings(resume=True))
    assert_same_end(asked.output, whole)


def test_logits_that_differ_in_the_last_bits_are_no_failure(settings, monkeypatch):
    module = sys.modules[FINISH]
    predict, calls = module.predict, []

    def nearly(model, data):
        logits, labels = predict(model, data)
        calls.append(model)
        return (logits + 3e-7 if len(calls) == 2 else logits), labels

    monkeypatch.setattr(module, "predict", nearly)
    saved = finetune(settings())["saved_model"]
    assert saved["bit_equal"]
    assert 0 < saved["max_difference_reloaded"] < saved["tolerance"]


@pytest.mark.parametrize("spoil", ["logits", "tensor", "nan"])
def test_a_model_that_comes_back_another_is_kept_and_said(settings, monkeypatch, spoil):
    module = sys.modules[FINISH]
    load = module.load_model

    @torch.no_grad()
    def other(*arguments, **named):
        model = load(*arguments, **named)
        if spoil == "tensor":
            model.bert.pooler.dense.bias[0] += 1e-6
        else:
            model.classifier.bias[0] += 1.0 if spoil == "logits" else float("nan")
        return model

    monkeypatch.setattr(module, "load_model", other)
    asked = settings()
    said = "logits within" if spoil == "logits" else "not finite|finite values|tensors, got others"
    with pytest.raises(SensiError, match=said):
        finetune(asked)
    assert (asked.output / "model" / "model.safetensors").exists()
    assert json.loads((asked.output / "report.json").read_text())["failed"]
    assert checkpoint.latest(asked.output) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_is_roundings_not_damage(dtype):
    logits = torch.tensor([[0.5, -2.0]])
    limit = rounding(torch.device("cpu"), dtype, logits)
    eps = torch.finfo(torch.bfloat16).eps if medium_rounds() else (torch.finfo(dtype).eps)
    assert torch.finfo(dtype).eps * 64 <= limit <= max(eps, torch.finfo(dtype).eps) * 200


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("method", ["sensi-bert", "dense"])
def test_a_poisoned_step_is_not_saved_over_the_last_good_one(
    settings, tmp_path, monkeypatch, method, step
):
    given = {"method": method, "checkpoint_every": 1}
    finetune(settings(output=tmp_path / "whole", **given))
    eager = Runner._eager

    def poisoned(self, batches, weights):
        loss = eager(self, batches, weights)
        if self.run.step == step:
            with torch.no_grad():
                next(p for n, p in self.model.named_parameters() if "LayerNorm.weight" in n)[3] = (
                    float("nan")
                )
        return loss

    monkeypatch.setattr(Runner, "_eager", poisoned)
    asked = settings(**given)
    said = rf"step {step + 1}: training diverged: .*LayerNorm\.weight is not finite; .*is kept"
    with pytest.raises(SensiError, match=said):
        finetune(asked)
    assert [p.name for p in (asked.output / "checkpoint").iterdir()] == [f"step-{step:08d}"]
    monkeypatch.undo()
    finetune(settings(resume=True, **given))
    assert_same_end(asked.output, tmp_path / "whole")


def test_every_run_has_a_checkpoint_at_the_trim_and_at_its_end(settings, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda output, step, *a, **k: (saved.append(step), save(output, step, *a, **k)),
    )
    finetune(settings(checkpoint_every=0, options={"warmup": 0.5}))
    assert saved == [4, 6]
