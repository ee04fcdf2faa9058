"""Experiment trackers: accelerate's TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import SensiError
from sensikernels._core.files import one_line, read_json, write_json

TRACKERS = ("mlflow", "tensorboard", "wandb")
FOLDER = "trackers"
_RUNS = "runs.json"
Log = Callable[[Mapping[str, float], int], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is no tracker's, or of one that is not installed."""
    require(not isinstance(names, str), "report_to", "a sequence of names", repr(names))
    for name in names:
        require_one_of(name, "report_to", TRACKERS)
        found = find_spec(name) is not None
        require(found, "report_to", f"{name} installed", f"none: pip install {name}")


@contextmanager
def tracking(
    names: Sequence[str], output: Path, config: Mapping[str, Any], step: int
) -> Iterator[Log]:
    """Start trackers below ``output``; yields what logs values at a step; closes them in the end.

    A run that goes on after ``step`` goes on in the same place.

    Raises:
        SensiError: a tracker cannot be started.
    """
    started: list[Any] = []
    with ExitStack() as stack:
        if names:
            folder = output / FOLDER
            known = read_json(folder / _RUNS) if (folder / _RUNS).exists() else {}
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                try:
                    tracker = _start(name, folder, known, step)
                    stack.callback(tracker.finish)
                    if name not in known.get("configured", []):
                        tracker.store_init_configuration(_plain(config))
                        known["configured"] = [*known.get("configured", []), name]
                except Exception as error:
                    raise SensiError(
                        f"report_to: {name} cannot be started: {one_line(error)}"
                    ) from error
                started.append(tracker)
            write_json(folder / _RUNS, known)

        def log(values: Mapping[str, float], at: int) -> None:
            for tracker in started:
                tracker.log(dict(values), step=at)

        yield log


def _start(name: str, folder: Path, known: dict[str, Any], step: int) -> Any:
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    tracker: Any
    if name == "tensorboard":
        # What a killed run logged beyond its last checkpoint is hidden.
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    elif name == "wandb":
        run = known.setdefault("wandb", uuid.uuid4().hex)
        tracker = WandBTracker("sensikernels", dir=str(folder), id=run, resume="allow")
    else:
        import mlflow

        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        artifacts = (folder / "mlflow").resolve().as_uri()
        tracker = MLflowTracker("sensikernels", logging_dir=artifacts, run_id=known.get("mlflow"))
    tracker.start()
    if name == "mlflow":
        known["mlflow"] = tracker.active_run.info.run_id
    return tracker


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the numbers and strings that every tracker takes."""
    kinds = (bool, int, float, str)
    return {k: v if isinstance(v, kinds) else json.dumps(v) for k, v in config.items()}
