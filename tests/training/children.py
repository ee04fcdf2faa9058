"""Runs in processes of their own, so that they can be killed. Imported by the fork server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sensikernels.training import Settings, finetune
from sensikernels.training.session import Session

# Where a process may end itself: after a step, inside the writing of a checkpoint, at a file
# operation in the output folder (counted from the start, or from the end of the last step), or
# after so many milliseconds.
STEP, WRITTEN, RENAMED = "step", "written", "renamed"
OPERATION, LATE, TIME = "operation", "late operation", "time"
_OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")

_server: Any = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "tests.training.children",
        "sensikernels.training.loop",
        "sensikernels.training.picture",
        "transformers.models.bert",
        "sklearn.metrics",
    ]
)


def run(settings: Settings, kill: tuple[str, int] | None = None) -> int:
    """Exit code of a fine-tuning process, which dies by SIGKILL where ``kill`` says."""
    process = _server.Process(target=_child, args=(settings, kill))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return int(process.exitcode)


def _child(settings: Settings, kill: tuple[str, int] | None) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    place, number = kill or (None, 0)
    if place in (WRITTEN, RENAMED):
        os.replace = _deadly(os.replace, place, number)
    if place in (OPERATION, LATE):
        count_operations(settings.output, number, from_the_end=place == LATE)
    if place == TIME:
        threading.Timer(number / 1e3, _die).start()
    if place == STEP:
        after_each_step(lambda session: session.step == number and _die())
    finetune(settings)
    os._exit(0)  # a timer that is still running is too late


def count_operations(output: Path, number: int, *, from_the_end: bool) -> None:
    """End this process just before file operation ``number`` below ``output``."""
    seen, armed = 0, not from_the_end

    def last_step(session: Session) -> None:
        nonlocal armed
        armed = armed or session.step == session.max_steps

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not armed or not (writes or event in _OPERATIONS):
            return
        if str(output) not in str(arguments[0]):
            return
        seen += 1
        if seen == number:
            _die()

    sync = os.fsync

    def synced(handle: int) -> None:
        count("os.truncate", (os.readlink(f"/proc/self/fd/{handle}"),))
        sync(handle)

    os.fsync = synced
    after_each_step(last_step)
    sys.addaudithook(count)


def after_each_step(act: Callable[[Session], object]) -> None:
    """Call ``act`` after each step of this process, before anything is written of it."""
    step = Session._step

    def acting(session: Session, part: Any) -> None:
        step(session, part)
        act(session)

    Session._step = acting  # type: ignore[method-assign]


def _deadly(replace: Callable[..., None], place: str, number: int) -> Callable[..., None]:
    """``os.replace`` that ends the process just before or after checkpoint ``number`` appears."""
    seen = 0

    def deadly(source: Any, target: Any) -> None:
        nonlocal seen
        is_checkpoint = Path(target).name.startswith("step-")
        seen += is_checkpoint
        due = is_checkpoint and seen == number
        if due and place == WRITTEN:
            _die()
        replace(source, target)
        if due:
            _die()

    return deadly


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
