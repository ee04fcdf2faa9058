"""A run killed by SIGKILL anywhere resumes to the same losses, to the bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from sensikernels.training.checkpoint import latest
from tests.training.children import RENAMED, STEP, WRITTEN, run

STEPS, EVERY = 12, 2
TRIM = 4  # warmup=0.35 of 12 steps


def losses(folder):
    return json.loads((folder / "report.json").read_text())["losses"]


def kept_alive(settings, tmp_path, **given):
    """The report's losses of a run that nobody kills."""
    whole = settings(output=tmp_path / "whole", checkpoint_every=EVERY, epochs=2, **given)
    assert run(whole) == 0
    return losses(whole.output)


def killed(settings, kills, **given):
    """The report of a run that dies as often as ``kills`` says."""
    first = settings(checkpoint_every=EVERY, epochs=2, **given)
    again = settings(checkpoint_every=EVERY, epochs=2, resume=True, **given)
    for turn, kill in enumerate(kills):
        assert run(again if turn else first, kill) == -signal.SIGKILL
    assert run(again) == 0
    return losses(first.output)


def options(method):
    named = {
        "sensi-bert": {"warmup": 0.35, "rewarm": 0.5},
        "dps": {"update_ratio": 0.25},
        "freeze": {"share": 0.5, "cache": True},
    }
    return named.get(method, {})


CASES = [
    ("sensi-bert", "fp32", True, "before and after the trim"),
    ("sensi-bert", "bf16", False, "after the trim"),
    ("bitfit", "bf16", True, "anywhere"),
    ("dps", "fp32", False, "anywhere"),
]
REST = [
    (method, dtype, compared, "anywhere")
    for method in ("dense", "sensi-bert", "bitfit", "dps", "freeze")
    for dtype in ("fp32", "bf16")
    for compared in (False, True)
]


def where(method, dtype, compared, when):
    rng = random.Random(f"{method} {dtype} {compared}")
    early, late = rng.randrange(1, TRIM), rng.randrange(TRIM + 2, STEPS)
    steps = {"before and after the trim": [early, late], "after the trim": [late]}
    return [(STEP, n) for n in steps.get(when, [rng.randrange(1, STEPS)])]


def check(settings, tmp_path, case):
    method, dtype, compared, _ = case
    given = {
        "method": method,
        "dtype": dtype,
        "compare_dense": compared,
        "options": options(method),
    }
    whole = kept_alive(settings, tmp_path, **given)
    assert len(whole["planned"]) == STEPS
    assert killed(settings, where(*case), **given) == whole


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(map(str, c)))
def test_killed_after_a_step(settings, tmp_path, case):
    check(settings, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", REST, ids=lambda c: " ".join(map(str, c)))
def test_killed_after_a_step_every_way(settings, tmp_path, case):
    check(settings, tmp_path, case)


def test_killed_while_writing_a_checkpoint(settings, tmp_path):
    given = {"options": options("sensi-bert")}
    whole = kept_alive(settings, tmp_path, **given)
    kills = [(WRITTEN, 1), (WRITTEN, 3), (RENAMED, 1), (WRITTEN, 2)]
    assert killed(settings, kills, **given) == whole


def test_sums_of_the_warm_up_survive_a_kill(settings, tmp_path):
    given = {"options": {**options("sensi-bert"), "ranked_on": "steps"}}
    whole = kept_alive(settings, tmp_path, **given)
    assert killed(settings, [(STEP, TRIM - 1)], **given) == whole


def test_the_command_killed_from_outside_resumes(settings, tiny, tmp_path):
    given = {"checkpoint_every": 1, "epochs": 2.5}
    whole = settings(output=tmp_path / "whole", **given)
    assert run(whole) == 0
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); "
        "torch.use_deterministic_algorithms(True, warn_only=True); "
        "from sensikernels.cli import main; raise SystemExit(main())",
        *f"finetune --task demo --model {tiny} --flops 0.6 --max-train-samples 96 --batch-size 16 "
        f"--epochs 2.5 --ranking-rows 64 --device cpu --checkpoint-every 1 "
        f"--output {output}".split(),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while latest(output) is None and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(0).random() * 0.2)
    process.kill()
    process.communicate()
    assert run(settings(resume=True, **given)) == 0
    assert losses(output) == losses(whole.output)
