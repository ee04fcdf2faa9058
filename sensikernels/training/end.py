"""The end of a run, tried before its first step, so that no training is lost."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensikernels._core.checks import require
from sensikernels._core.errors import DataError, SensiError
from sensikernels._core.files import nobody, one_line, remove, require_writable
from sensikernels.data import compute
from sensikernels.training.config import DTYPES, Settings
from sensikernels.training.output import CHECKPOINTS, LOCK, RESULTS, UNFINISHED
from sensikernels.training.runner import Runner
from sensikernels.training.session import Session


def check_end(session: Session) -> None:
    """Check what is needed after the last step: metric, picture, files, room on the disk.

    Raises:
        UsageError: a library is not installed. SensiError: the disk refuses, or has no room.
    """
    settings, task = session.settings, session.data.task
    compute(task, *session.data.kind.sample(task))
    if settings.predict is not None:
        _check_predictions(settings, settings.predict)
    ranks = session.runner.method.needs_budget and settings.plan is None
    drawn = find_spec("matplotlib") is not None
    require(
        drawn or not ranks,
        "sensitivity.png",
        "matplotlib installed",
        "none: pip install 'sensikernels[demo]'",
    )
    _try_saving(session.runner.model, session.data.tokenizer, settings.output)
    _check_room(session)


def _check_predictions(settings: Settings, path: Path) -> None:
    """Raise UsageError unless the file of predictions can be written; a continuation's own may."""
    taken = [settings.output / name for name in (*RESULTS, CHECKPOINTS, UNFINISHED, LOCK)]
    place = path.resolve()
    inside = [own for own in taken if own.resolve() in (place, *place.parents)]
    require(not inside, "predict", "a file that the run does not write itself", path)
    require_writable({"predict": path}, (lambda _: None) if settings.resume else nobody)


def _try_saving(model: Any, tokenizer: Any, output: Path) -> None:
    """Write what is small of the model's folder, and take it away again."""
    folder = output / UNFINISHED
    try:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise SensiError(f"{output}: cannot be written: {error.strerror or error}") from error
    except Exception as error:
        raise DataError(f"model: config or tokenizer cannot be saved: {one_line(error)}") from error
    finally:
        remove(folder)


def _check_room(session: Session) -> None:
    """Two checkpoints, as the older goes when the newer is whole, and the model."""
    settings = session.settings
    weights = _bytes(session.runner.model)
    state = sum(_state_bytes(settings, runner) for runner in session.runners)
    kept = weights if settings.keep_best else 0
    needed = 2 * (state + kept) + weights
    held = sum(p.stat().st_size for p in settings.output.rglob("*") if p.is_file())
    free = shutil.disk_usage(settings.output).free + held
    if free < needed:
        raise SensiError(
            f"{settings.output}: cannot be written: No space: checkpoints and model take about "
            f"{needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free"
        )


def _state_bytes(settings: Settings, runner: Runner) -> int:
    """Weights, two float32 moments of what trains, and masters where weights are narrower."""
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    masters = 4 if DTYPES[settings.dtype] is not torch.float32 else 0
    return _bytes(runner.model) + trained * (8 + masters)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
