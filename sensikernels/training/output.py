"""The output folder: one run's own, and nothing half-written, whatever stops the run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sensikernels._core.checks import expected
from sensikernels._core.errors import SensiError, UsageError
from sensikernels._core.files import partial_name, remove, write_json, writing
from sensikernels.training.trackers import FOLDER

CHECKPOINTS = "checkpoint"
UNFINISHED = ".unfinished"
REPORT = "report.json"
LOCK = ".run"
"""Held by the run under way; left behind, it says that a run was killed here."""
_STARTED = (CHECKPOINTS, UNFINISHED, REPORT, LOCK, FOLDER)
RESULTS = ("model", "plan.json", "plan.safetensors", "sensitivity.png", REPORT)

__all__ = ["output_folder", "remove", "tidy", "write_json", "writing"]


@contextmanager
def output_folder(path: Path, *, resume: bool) -> Iterator[Path]:
    """Make ``path`` this run's until the block ends; a folder that is empty then goes again.

    A lock that the kernel drops when the process dies, however it dies, keeps other runs out.

    Raises:
        UsageError: ``path`` is a file; another run writes to it; it holds something and this is no
            continuation of a run.
        SensiError: the folder cannot be made.
    """
    _refuse_foreign(path, resume)
    made = [p for p in (path, *path.parents) if not p.exists()]
    lock = _locked(path)
    mine = os.fstat(lock).st_size == 0  # else a killed run's, which stays until it is continued
    try:
        if not resume:
            _refuse_interrupted(path, mine)
        os.pwrite(lock, f"{os.getpid():<20}".encode(), 0)
        mine = True
        tidy(path)
        yield path
    except BaseException:
        _let_go(path, lock, mine)
        _remove_empty([path / CHECKPOINTS, *made])
        raise
    _let_go(path, lock, mine)


def tidy(path: Path) -> None:
    """Remove what a killed run had not finished writing into ``path``."""
    parts = [path / UNFINISHED, *(partial_name(path / name) for name in RESULTS)]
    parts += (path / CHECKPOINTS).glob(".step-*.tmp")
    for part in parts:
        remove(part)


def _names(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()} if path.exists() else set()


def _refuse_foreign(path: Path, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"output: expected a folder, got the file {path}")
    names = _names(path)
    if LOCK in names:
        return  # whose it is, the lock tells
    if not resume and names:
        raise UsageError(f"output: expected an empty or new folder, got {path}, {_what(names)}")
    if resume and names and not names & set(_STARTED):
        raise UsageError(f"output: expected a run to resume, got {path} without a checkpoint")


def _refuse_interrupted(path: Path, new: bool) -> None:
    """Under the lock: nothing is there, and the lock is ``new``, not one of a killed run."""
    names = _names(path) - ({LOCK} if new else set())
    if names:
        raise UsageError(f"output: expected an empty or new folder, got {path}, {_what(names)}")


def _let_go(path: Path, lock: int, mine: bool) -> None:
    if mine:
        remove(path / LOCK)
    os.close(lock)


def _what(names: set[str]) -> str:
    if REPORT in names:
        return "which holds a finished run (--resume shows its report)"
    if names & set(_STARTED):
        return "which holds an interrupted run (--resume continues it)"
    return f"with {len(names)} entries (--resume continues a run)"


def _locked(path: Path) -> int:
    """A descriptor that holds the lock of ``path``, which is made if it is not there."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # another run was refused, and took its empty folder away
        except OSError as error:
            raise SensiError(f"output {path}: cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path / LOCK, handle):
                return handle
        except BlockingIOError as error:
            owner = os.pread(handle, 20, 0).decode(errors="replace").strip() or "another"
            os.close(handle)
            wanted = "a folder that no other run writes to"
            raise expected("output", wanted, f"{path}: process {owner} does") from error
        except OSError as error:
            os.close(handle)
            raise SensiError(f"output {path}: cannot be locked: {error.strerror}") from error
        os.close(handle)  # a run that ended took this file away: try the new one


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in filter(Path.is_dir, folders):
        try:
            folder.rmdir()
        except OSError:  # something is in it: it stays, and so do those around it
            if folder.name != CHECKPOINTS:
                return
