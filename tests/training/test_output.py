"""One run, one folder: a lock that dies with its process, and what is left of a killed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.training import finetune
from sensikernels.training.output import CHECKPOINTS, LOCK, REPORT, output_folder, tidy
from tests.training.children import STEP, run

HOLD = """
import sys
from pathlib import Path
from sensikernels._core.errors import UsageError
from sensikernels.training.output import output_folder
try:
    with output_folder(Path(sys.argv[1]), resume=False):
        print("in", flush=True)
        sys.stdin.read()
except UsageError as error:
    print(error, flush=True)
"""


def start(path):
    """A process that enters the folder, says so, and stays until its input ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


@pytest.fixture
def held(tmp_path):
    """A folder that another process writes to."""
    path = tmp_path / "out"
    with start(path) as process:
        assert process.stdout.readline() == "in\n"
        yield path, process
        process.stdin.close()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_at_once(held, resume):
    path, process = held
    said = f"output: expected a folder that no other run writes to, got .*: process {process.pid}"
    begin = time.monotonic()
    with pytest.raises(UsageError, match=said), output_folder(path, resume=resume):
        pytest.fail("entered")
    assert time.monotonic() - begin < 1
    assert [p.name for p in path.iterdir()] == [LOCK]


def test_of_many_that_start_at_once_one_enters(tmp_path):
    for turn in range(8):
        path = tmp_path / f"out {turn}"
        runs = [start(path) for _ in range(5)]
        said = [process.stdout.readline() for process in runs]
        for process in runs:
            process.communicate()
        assert said.count("in\n") == 1, said
        assert sum("no other run writes" in line for line in said) == len(runs) - 1, said
        assert list(path.iterdir()) == []


def test_a_killed_run_frees_its_folder_and_says_how_to_go_on(held):
    path, process = held
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = r"expected an empty or new folder, got .*interrupted run \(--resume continues it\)"
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(UsageError, match=said), output_folder(path, resume=False):
            pytest.fail("entered")
        assert [p.name for p in path.iterdir()] == [LOCK]
    with output_folder(path, resume=True):
        (path / "result").write_text("")
    assert [p.name for p in path.iterdir()] == ["result"]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(settings):
    asked = settings(options={"warmup": 0.5})
    assert run(asked, (STEP, 1)) == -signal.SIGKILL
    assert [p.name for p in asked.output.iterdir()] == [LOCK]
    with pytest.raises(UsageError, match="interrupted run"):
        finetune(asked)
    report = finetune(settings(options={"warmup": 0.5}, resume=True))
    assert len(report["losses"]["planned"]) == 6
    assert LOCK not in {p.name for p in asked.output.iterdir()}


def test_of_a_finished_run_the_refusal_says_so(settings):
    finetune(settings(method="bitfit"))
    with pytest.raises(UsageError, match="which holds a finished run"):
        finetune(settings(method="bitfit"))


def test_tidying_takes_what_is_half_written_and_nothing_else(tmp_path):
    own = [
        ".model.tmp/x",
        f".{REPORT}.tmp",
        ".plan.json.tmp",
        ".unfinished/z",
        f"{CHECKPOINTS}/.step-00000002.tmp/y",
    ]
    others = ["mine", ".mine.tmp", f"{CHECKPOINTS}/step-00000001/state.json", "model/config.json"]
    for name in (*own, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    tidy(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(others)
