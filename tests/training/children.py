"""Runs in processes of their own, so that they can be killed. Imported by the fork server."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sensikernels.training import Settings, finetune
from sensikernels.training.loop import Progress

# Where a process may end itself: after a step, or inside the writing of a checkpoint.
STEP, WRITTEN, RENAMED = "step", "written", "renamed"

_server: Any = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([
    "tests.training.children", "sensikernels.training.loop", "sensikernels.training.picture",
    "transformers.models.bert", "sklearn.metrics",
])  # fmt: skip


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
    finetune(settings, _deadly_watch(number) if place == STEP else None)


def _deadly_watch(step: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.step == step:
            _die()

    return watch


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
