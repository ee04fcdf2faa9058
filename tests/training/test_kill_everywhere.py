"""SIGKILL at any moment, in any method: the run resumes to the same losses and the same report.

The marked ones take half an hour; CONTRIBUTING.md has the command.
"""

from __future__ import annotations

import random
import shutil
import signal

import pytest

from sensikernels.methods import METHODS
from tests.methods.small import OPTIONS
from tests.training.children import LATE, OPERATION, STEP, TIME, run
from tests.training.processes import run_together
from tests.training.reports import assert_same_end

CACHED = {"freeze": {"cache": True}}
STEPS = 12
WAYS = [
    (method, every, packed)
    for method in sorted(METHODS)
    for every in (2, 0)
    for packed in (True, False)
]


def given_of(method, every, packed):
    options = OPTIONS.get(method, {}) | (CACHED.get(method, {}) if packed else {})
    return {
        "method": method,
        "options": options,
        "checkpoint_every": every,
        "packed": packed,
        "epochs": 2,
    }


def moments(method, every, packed):
    """A step, a file operation and a time, drawn anew for every way to train."""
    rng = random.Random(f"{method} {every} {packed}")
    return [
        (STEP, rng.randrange(1, STEPS + 1)),
        (OPERATION, rng.randrange(2, 60)),
        (TIME, rng.randrange(200, 4000)),
    ]


def check(settings, tmp_path, way, kills):
    given = given_of(*way)
    whole = settings(output=tmp_path / "whole", **given)
    assert run(whole) == 0
    for number, kill in enumerate(kills):
        output = tmp_path / f"killed {number}"
        first = settings(output=output, **given)
        code = run(first, kill)
        assert code in (0, -signal.SIGKILL)
        assert code or kill[0] != STEP
        assert run(settings(output=output, resume=True, **given)) == 0
        assert_same_end(output, whole.output)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda w: " ".join(map(str, w)))
def test_three_moments_of_every_way(settings, tmp_path, way):
    check(settings, tmp_path, way, moments(*way))


def test_a_short_run_killed_before_and_at_its_end(settings, tmp_path):
    """Without a checkpoint on the way: before the trim, after it, and in the last writes."""
    kills = [(STEP, 2), (STEP, STEPS), (LATE, 25)]
    check(settings, tmp_path, ("sensi-bert", 0, True), kills)


def nearly_done(settings, tmp_path):
    """A whole run, and one killed one step before its end."""
    given = given_of("sensi-bert", STEPS - 1, True)
    whole, first = (settings(output=tmp_path / n, **given) for n in ("whole", "first"))
    assert run(whole) == 0
    # The checkpoint of step 11 is written after the watcher was told: the next one kills.
    assert run(first, (STEP, STEPS)) == -signal.SIGKILL
    return given, whole.output, first.output


def die_late(settings, tmp_path, number, given, whole, first):
    """Resume a copy, die at file operation ``number`` of the end; False where there are fewer."""
    output = tmp_path / f"at {number}"
    shutil.copytree(first, output)
    again = settings(output=output, resume=True, **given)
    code = run(again, (LATE, number))
    assert code in (0, -signal.SIGKILL)
    assert run(again) == 0
    assert_same_end(output, whole)
    shutil.rmtree(output)
    return code != 0


@pytest.mark.slow
def test_killed_at_every_file_operation_of_the_end(settings, tmp_path):
    made = nearly_done(settings, tmp_path)
    number = 1
    while die_late(settings, tmp_path, number, *made):
        number += 1
    assert number > 40


@pytest.mark.slow
def test_killed_again_at_every_file_operation(settings, tmp_path):
    """One folder, killed at its first operation, resumed and killed at the second, and so on."""
    given = given_of("sensi-bert", 2, True)
    whole = settings(output=tmp_path / "whole", **given)
    assert run(whole) == 0
    number, code = 1, run(settings(**given), (OPERATION, 1))
    while code == -signal.SIGKILL:
        number += 1
        code = run(settings(resume=True, **given), (OPERATION, number))
    assert code == 0
    assert number > 10
    assert_same_end(tmp_path / "out", whole.output)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("method", ["sensi-bert", "dps", "bitfit"])
def test_one_of_two_ranks_killed(settings, tmp_path, method, victim):
    given = given_of(method, 2, True)
    whole = settings(output=tmp_path / "whole", **given)
    assert run_together(whole) == [0, 0]
    first, again = (settings(resume=resume, **given) for resume in (False, True))
    codes = run_together(first, kill=(STEP, 7), victim=victim)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, None)
    assert run_together(again) == [0, 0]
    assert_same_end(tmp_path / "out", whole.output)
