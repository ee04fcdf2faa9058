"""The output folder: nothing half-written, whatever stops the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sensikernels.errors import SensiError, UsageError

CHECKPOINTS = "checkpoint"
UNFINISHED = ".unfinished"
REPORT = "report.json"


@contextmanager
def output_folder(path: Path, *, resume: bool) -> Iterator[Path]:
    """Make ``path`` now, and take it away again if the run fails before writing into it.

    Raises:
        UsageError: ``path`` is a file, or holds something and this is no continuation of a run.
        SensiError: the folder cannot be made.
    """
    _refuse_foreign(path, resume)
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SensiError(f"output {path}: cannot be made: {error.strerror}") from error
    try:
        yield path
    except BaseException:
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise


def _refuse_foreign(path: Path, resume: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"output: expected a folder, got the file {path}")
    names = {p.name for p in path.iterdir()}
    if not resume and names:
        raise UsageError(
            f"output: expected an empty or new folder, got {path} with {len(names)} entries "
            "(--resume continues a run)"
        )
    if resume and names and not names & {CHECKPOINTS, UNFINISHED, REPORT}:
        raise UsageError(f"output: expected a run to resume, got {path} without a checkpoint")


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary neighbour of ``target``, renamed to it when the block ends without an error.

    The block makes a file or a folder there; either replaces what is at ``target``. On any error
    it is removed. Raises SensiError where the disk refuses.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        remove(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        if temporary.is_dir():
            remove(target)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        remove(temporary)
        reason = getattr(error, "strerror", None) or str(error)
        raise SensiError(f"{target}: cannot be written: {reason}") from error
    except BaseException:
        remove(temporary)
        raise


def write_json(target: Path, content: Any) -> None:
    """Write JSON by renaming."""
    with writing(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
