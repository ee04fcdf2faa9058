"""Two processes do what one does: the same losses, plan and report; checkpoints move between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.hf import sensitivity
from sensikernels.masks import Plan
from sensikernels.training import finetune
from sensikernels.training.checkpoint import latest
from sensikernels.training.data import Data
from sensikernels.training.distributed import join
from sensikernels.world import World
from tests.methods.small import OPTIONS
from tests.training.children import STEP, run
from tests.training.processes import free_port, run_together


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


TIMES = {
    "step_ms",
    "step_speedup",
    "tokens_per_s",
    "seconds",
    "evaluated_after",
    "settings",
    "events",
    "losses",
}


@pytest.fixture
def asked(settings, still, tmp_path):
    """``Settings`` of 12 steps of 16 rows, one in each epoch of 9; into ``tmp_path / name``."""

    def make(name, method="sensi-bert", **given):
        common = {"max_train_samples": 89, "epochs": 2, "options": OPTIONS.get(method, {})}
        named = {"model": str(still), **common, **given}
        return settings(output=tmp_path / name, method=method, **named)

    return make


def report_of(settings):
    return json.loads((settings.output / "report.json").read_text())


def losses_of(settings):
    return torch.tensor(report_of(settings)["losses"]["planned"])


def assert_same_run(one, two, rtol=1e-4):
    torch.testing.assert_close(losses_of(two), losses_of(one), rtol=rtol, atol=1e-5)
    plans = [s.output / "plan.json" for s in (one, two)]
    assert plans[0].exists() == plans[1].exists()
    if plans[0].exists():
        grids = [
            {n: m.grid for kind in (p.weight_masks, p.update_masks) for n, m in kind.items()}
            for p in map(Plan.load, plans)
        ]
        assert grids[0].keys() == grids[1].keys()
        return [(a, grids[1][n]) for n, a in grids[0].items()]
    return []


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_the_batch_and_their_weights_its_mean(asked, size):
    asked = asked("out", batch_size=6)
    alone, *members = (
        Data.load(asked, torch.device("cpu"), World(rank=rank, size=many))
        for many in (1, size)
        for rank in range(many)
    )
    whole = list(alone.shares(1, 2))
    for global_batch, *shares in zip(whole, *(m.shares(1, 2) for m in members), strict=True):
        labels = global_batch.batch["labels"].double()
        means = [p.batch["labels"].double().mean() * p.weight for p in shares]
        torch.testing.assert_close(sum(means) / size, labels.mean())
        assert {p.tokens for p in shares} == {global_batch.tokens}
        assert sum(p.weight > 0 for p in shares) == min(size, len(labels))
    assert global_batch.weight == 1
    rows = [b["labels"].tolist() for b in alone.evaluated()]
    turns = [[b["labels"].tolist() for b in m.evaluated(m.world)] for m in members]
    assert len({len(own) for own in turns}) == 1
    assert [r for turn in zip(*turns, strict=True) for r in turn][: len(rows)] == rows


def test_what_several_processes_refuse(asked, monkeypatch):
    monkeypatch.setattr(World, "here", lambda: World(size=2))
    with pytest.raises(UsageError, match="criterion: expected not learned in several"):
        sensitivity(nn.Linear(1, 1), [], "learned")
    with pytest.raises(UsageError, match="parallel: expected ddp for dps"):
        asked("out", "dps", parallel="fsdp")
    with pytest.raises(UsageError, match="parallel"):
        asked("out", parallel="tensor")
    assert asked("out", parallel="fsdp").identity() == asked("out").identity()


@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        (
            "WORLD_SIZE",
            "3",
            SensiError,
            r"processes: expected 3 \(WORLD_SIZE\) to meet on cpu, got 1",
        ),
        ("WORLD_SIZE", "two", UsageError, "WORLD_SIZE: expected a whole number, got 'two'"),
        ("WORLD_SIZE", "-2", UsageError, "WORLD_SIZE: expected a whole number"),
    ],
)
def test_processes_that_do_not_meet(asked, monkeypatch, name, value, error, said):
    """Each would run alone, and all into one folder."""
    monkeypatch.setattr(
        "accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=1, process_index=0)
    )
    monkeypatch.setenv(name, value)
    with pytest.raises(error, match=said):
        finetune(asked("out"))
    assert not asked("out").output.exists()


def test_a_group_that_cannot_be_formed_is_one_line(asked, monkeypatch):
    def refuses(**_):
        raise ValueError("MASTER_ADDR expected,\nbut not set")

    monkeypatch.setattr("accelerate.PartialState", refuses)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SensiError, match="the 2 started do not meet: MASTER_ADDR expected, but"):
        finetune(asked("out"))


@pytest.mark.parametrize(
    ("asked_for", "found", "kind"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_the_group_is_formed_on_the_device_that_is_used(asked, monkeypatch, asked_for, found, kind):
    formed = []

    def state(cpu):
        formed.append(cpu)
        return SimpleNamespace(num_processes=1, process_index=0)

    monkeypatch.setattr("torch.cuda.is_available", lambda: found)
    monkeypatch.setattr("accelerate.PartialState", state)
    join(asked("out", device=asked_for))
    assert formed == [kind == "cpu"]


@pytest.mark.parametrize("method", [slow("dense"), "sensi-bert", "bitfit", "dps"])
def test_two_processes_lose_what_one_does(asked, method):
    one, two = asked("one", method), asked("two", method)
    assert run(one) == 0
    assert run_together(two) == [0, 0]
    for a, b in assert_same_run(one, two):
        # Of entries that rounding cannot tell apart, either may be chosen: a swap, or one in 1,000.
        other = (a != b).sum()
        assert other == 0 or (method == "dps" and other <= max(2, a.numel() / 1000))


@pytest.mark.parametrize(
    "given",
    [
        slow({"packed": False, "compare_dense": True}),
        slow({"embeddings": "dense", "dtype": "bf16"}),
        {"batch_size": 8, "max_train_samples": 25},  # the last batch has one row for two processes
    ],
    ids=["padded", "bf16", "left over"],
)
def test_other_steps(asked, given):
    one, two = asked("one", "dense", **given), asked("two", "dense", **given)
    assert run(one) == 0
    assert run_together(two) == [0, 0]
    assert_same_run(one, two, rtol=2e-2 if given.get("dtype") == "bf16" else 1e-4)


@pytest.mark.slow
def test_reports_differ_in_times_alone(asked):
    one, two = asked("one"), asked("two")
    assert run(one) == 0
    assert run_together(two) == [0, 0]
    mine, theirs = report_of(one), report_of(two)
    assert (mine["numerics"].pop("processes"), theirs["numerics"].pop("processes")) == (1, 2)
    assert mine["saved_model"].pop("max_difference_to_trained") < 1e-5
    assert theirs["saved_model"].pop("max_difference_to_trained") < 1e-5
    for report in (mine, theirs):
        report["metrics"] = report["metrics"]["planned"][-1]["accuracy"]
    assert {k: v for k, v in mine.items() if k not in TIMES} == {
        k: v for k, v in theirs.items() if k not in TIMES
    }
    assert {p.name for p in one.output.iterdir()} == {p.name for p in two.output.iterdir()}


@pytest.mark.parametrize(
    ("method", "before"),
    [
        ("sensi-bert", 2),
        slow("sensi-bert", 1),
        slow("dps", 1),
        slow("dps", 2),
    ],
)
def test_a_checkpoint_moves_between_one_process_and_two(asked, method, before):
    whole = asked("whole", method)
    first, again = (
        asked("moved", method, checkpoint_every=2, resume=resume) for resume in (False, True)
    )
    assert run(whole) == 0
    if before == 1:
        assert run(first, (STEP, 7)) == -signal.SIGKILL
        assert run_together(again) == [0, 0]
    else:
        killed, left = run_together(first, kill=(STEP, 7))
        assert killed == -signal.SIGKILL
        assert left not in (0, None)
        assert run(again) == 0
    assert_same_run(whole, again)
    assert "step 6: resumed" in report_of(again)["events"]


def torchrun(*arguments, device=("--device", "cpu")):
    """README's command; ``device``: what it is told of one, if anything."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("-m", "sensikernels.cli", "finetune", *device, *map(str, arguments)),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes would share this machine's GPU")
def test_torchrun_runs_the_command_and_tells_once(still, tmp_path):
    process = torchrun(
        "--model",
        still,
        "--flops",
        0.6,
        "--max-train-samples",
        64,
        "--ranking-rows",
        64,
        "--output",
        tmp_path / "out",
        device=(),
    )
    told, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert told.count("trimmed to FLOPs") == 1
    assert report_of(SimpleNamespace(output=tmp_path / "out"))["numerics"]["processes"] == 2


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all(still, tmp_path):
    (tmp_path / "taken").write_text("")
    process = torchrun("--model", still, "--flops", 0.6, "--output", tmp_path)
    _, complained = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "output: expected an empty or new folder" in complained
    assert "exitcode  : 2" in complained


@pytest.mark.slow
def test_a_killed_process_ends_the_command(still, tmp_path):
    output = tmp_path / "out"
    process = torchrun(
        "--model",
        still,
        "--method",
        "dense",
        "--epochs",
        1000,
        "--checkpoint-every",
        2,
        "--output",
        output,
    )
    while latest(output) is None and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [c for c in children if b"sensikernels" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, complained = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9" in complained
    assert not (output / "report.json").exists()


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_bit_with_dropout(asked, tiny):
    common = {"model": str(tiny), "checkpoint_every": 2}
    whole, first = (asked(name, **common) for name in ("whole", "out"))
    assert run_together(whole) == [0, 0]
    assert run_together(first, kill=(STEP, 7))[0] == -signal.SIGKILL
    assert run_together(asked("out", **common, resume=True)) == [0, 0]
    assert torch.equal(losses_of(first), losses_of(whole))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        slow("dense", {}),
        ("sensi-bert", {}),
        slow("bitfit", {"packed": False}),
        slow("dense", {"embeddings": "dense", "dtype": "bf16"}),
    ],
    ids=["dense", "sensi-bert", "bitfit padded", "bf16"],
)
def test_shards_lose_what_one_process_does(asked, method, given):
    one, two = asked("one", method, **given), asked("two", method, **given, parallel="fsdp")
    assert run(one) == 0
    assert run_together(two) == [0, 0]
    low = given.get("dtype") == "bf16"
    assert_same_run(one, two, rtol=2e-2 if low else 1e-4)
    gap = report_of(two)["saved_model"]["max_difference_to_trained"]
    assert gap < (1e-2 if low else 1e-5)


@pytest.mark.slow
def test_a_checkpoint_moves_from_three_shards_to_one_process_and_back(asked):
    whole, first = asked("whole"), asked("moved", checkpoint_every=2, parallel="fsdp")
    assert run(whole) == 0
    assert run_together(first, 3, kill=(STEP, 9))[0] == -signal.SIGKILL
    assert run(asked("moved", checkpoint_every=1, resume=True), (STEP, 10)) == -signal.SIGKILL
    again = asked("moved", resume=True, parallel="fsdp")
    assert run_together(again, 3) == [0, 0, 0]
    assert_same_run(whole, again)
