"""Options of the step: schedules as transformers', clipping off, accumulation as one big batch."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.hf.schedule import SCHEDULES
from sensikernels.training import finetune
from sensikernels.training.loop import prepare
from sensikernels.training.runner import Runner
from sensikernels.training.schedule import Schedule
from tests.training.children import STEP, run
from tests.training.processes import run_together


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_transformers(settings, name):
    from transformers import get_scheduler

    warm = 0 if name == "constant" else 3
    asked = settings(schedule=name, warmup_steps=warm, lr=3e-3)
    mine = Schedule.of(asked, "linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=11)
    for step in range(11):
        assert mine.rate(3e-3, step, 11) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


def test_a_warm_up_as_a_share_is_rounded_up_and_constant_gets_its_own(settings):
    made = Schedule.of(settings(warmup_ratio=0.25), "constant")
    assert made.to_json(10) == {"name": "constant_with_warmup", "warmup_steps": 3}
    assert [made.rate(1.0, step, 10) for step in (0, 3, 9)] == [0.0, 1.0, 1.0]
    assert Schedule.of(settings(), "linear").rate(0.3, 1, 3) == 0.3 * (1 - 1 / 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "reduce_lr_on_plateau"}, "schedule: expected one of constant, constant_with"),
        ({"schedule": "constant", "warmup_steps": 2}, "schedule: expected constant_with_warmup"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: expected a share of the steps"),
        ({"warmup_ratio": 0.1, "warmup_steps": 2}, "warmup_ratio: expected none beside"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a finite number"),
    ],
)
def test_refusals(settings, given, said):
    with pytest.raises(UsageError, match=said):
        settings(**given)


def test_both_models_take_the_schedule_and_a_resumed_run_goes_on_with_it(
    settings, monkeypatch, tmp_path
):
    rates = {}
    set_rate = Runner._set_rate

    def noted(self):
        set_rate(self)
        rates[self.name, self.run.step] = self.run.optimizer.param_groups[0]["lr"]

    monkeypatch.setattr(Runner, "_set_rate", noted)
    given = {"schedule": "cosine", "warmup_steps": 2, "lr": 1e-3, "compare_dense": True}
    whole = finetune(settings(**given, output=tmp_path / "whole"))
    wanted = dict(rates)
    rates.clear()
    assert len(wanted) == 12
    assert all(wanted["sensi-bert", n] == wanted["dense baseline", n] for n in range(6))
    assert wanted["sensi-bert", 1] == 0.5e-3
    first = settings(**given, checkpoint_every=2)
    assert run(first, (STEP, 5)) == -signal.SIGKILL
    again = finetune(settings(**given, checkpoint_every=2, resume=True))
    assert rates == {key: rate for key, rate in wanted.items() if key[1] >= 4}
    assert again["losses"]["planned"] == pytest.approx(whole["losses"]["planned"], rel=1e-5)
    assert again["schedule"]["dense"] == {"name": "cosine", "warmup_steps": 2}


@pytest.mark.parametrize("compared", ["sensi-bert", "dense baseline"])
def test_nothing_is_clipped_with_a_limit_of_0(settings, compared):
    session = prepare(settings(max_grad_norm=0.0, compare_dense=True))
    runner = next(r for r in session.runners if r.name == compared)
    assert runner.max_grad_norm is None
    assert getattr(runner.run.optimizer, "max_grad_norm", None) is None
    assert finetune(settings(max_grad_norm=0.0))["settings"]["max_grad_norm"] == 0.0


GRADIENTS = [("sparse", True), ("dense", True), ("dense", False)]


@pytest.mark.parametrize(("embeddings", "packed"), GRADIENTS)
def test_accumulated_gradients_are_the_big_batchs(settings, still, embeddings, packed):
    """Also where the rows do not divide: 3 batches of 16, 16 and 9."""
    given = {"model": str(still), "embeddings": embeddings, "packed": packed, "method": "dense"}
    common = {**given, "max_train_samples": 41}
    seen = []
    for asked in ({"gradient_accumulation_steps": 3, "batch_size": 16}, {"batch_size": 41}):
        session = prepare(settings(**common, **asked))
        runner = session.runner
        runner.run.optimizer.step = lambda: None
        runner.run.optimizer.zero_grad = lambda set_to_none: None
        (parts,) = session.data.steps(0)
        loss = runner.step(*(p.batch for p in parts), weights=[p.weight for p in parts])
        grads = {n: p.grad.to_dense() for n, p in runner.model.named_parameters()}
        seen.append((loss, grads))
        assert runner.model.get_input_embeddings().weight.grad.is_sparse == (embeddings == "sparse")
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
    for name, grad in seen[0][1].items():
        torch.testing.assert_close(grad, seen[1][1][name], rtol=2e-4, atol=2e-6, msg=name)


def counted(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("method", ["sensi-bert", "dps"])
def test_a_run_that_accumulates_counts_optimizer_steps_and_survives_a_kill(
    settings, tmp_path, method
):
    options = {"sensi-bert": {"warmup": 0.35}, "dps": {"update_ratio": 0.25}}[method]
    given = {"method": method, "options": options, "gradient_accumulation_steps": 4, "epochs": 3}
    whole = settings(output=tmp_path / "whole", **given)
    assert run(whole) == 0
    first = settings(checkpoint_every=1, **given)
    assert run(first, (STEP, 4)) == -signal.SIGKILL
    assert run(settings(checkpoint_every=1, resume=True, **given)) == 0
    report, resumed = counted(whole.output), counted(first.output)
    assert report["steps"]["total"] == 6  # six batches an epoch: four and two
    assert resumed["losses"] == report["losses"]
    assert report["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_accumulate_as_one(settings, still, tmp_path, parallel):
    given = {"model": str(still), "gradient_accumulation_steps": 2, "max_train_samples": 89}
    one = settings(output=tmp_path / "one", **given)
    two = settings(output=tmp_path / "two", parallel=parallel, **given)
    assert run(one) == 0
    assert run_together(two) == [0, 0]
    mine, theirs = (torch.tensor(counted(s.output)["losses"]["planned"]) for s in (one, two))
    assert len(mine) == 3
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_step_that_accumulates_is_not_captured(settings):
    runner = prepare(settings(gradient_accumulation_steps=3)).runner
    assert runner._needs_eager() == "a step adds up the gradients of 3 batches"
