"""``sensikernels bench``: what a suite takes, what it may overwrite, and running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from sensikernels._core.checks import require
from sensikernels._core.errors import SensiError, UsageError
from sensikernels._core.files import parse_json, read_json, require_writable

_ROW = {"suite", "case", "candidate", "baseline"}
_PNG = b"\x89PNG\r\n\x1a\n"


class Suite(str, Enum):
    """Benchmark suites."""

    linear = "linear"
    reductions = "reductions"
    optimizer = "optimizer"
    step = "step"
    step_time = "step-time"
    finetune = "finetune"


_TAKES: Mapping[Suite, tuple[str, ...]] = {
    Suite.linear: ("rounds", "seconds", "picture"),
    Suite.step: ("data-dir", "squad-dir", "case", "only"),
    Suite.step_time: ("data-dir",),
    Suite.finetune: ("data-dir", "only", "seeds", "samples", "picture"),
}


def run_suite(
    suite: Suite, device: str, quick: bool, json: Path | None, given: Mapping[str, Any]
) -> None:
    """Time a suite, show its rows, and write them.

    Raises:
        UsageError: an option of another suite; an output that cannot be written, before any work.
        SensiError: a package that the suite needs is not installed.
    """
    from importlib import import_module

    from sensikernels.bench import rows
    from sensikernels.cli.show import progress_lines, show_rows

    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if name not in _TAKES.get(suite, ()):
            raise UsageError(f"{name}: expected none for suite {suite.value}, got {value}")
    _check_machine(device, asked.get("seconds", 0.0))
    picture = asked.pop("picture", None)
    _check_outputs(json, picture)
    try:  # by name: a suite costs its imports only where it is asked for
        module = import_module(f"sensikernels.bench.{suite.name}")
    except ModuleNotFoundError as error:
        why = f"{error}: pip install 'sensikernels[hf,bench]'"
        raise SensiError(f"bench {suite.value}: {why}") from error
    named = {name.replace("-", "_"): value for name, value in asked.items()}
    with progress_lines() as progress, rows.journal(json):
        result = module.run(device=device, quick=quick, progress=progress, **named)
        show_rows(result)
        if json is not None:
            rows.write(json, result, device)
    if picture is not None:
        if suite is Suite.linear:
            from sensikernels.bench.roofline import draw
        else:
            draw = module.draw
        draw(rows.to_dicts(result), picture)


def _check_machine(device: str, seconds: float) -> None:
    import torch

    require(device in ("cpu", "cuda"), "device", "cpu or cuda", repr(device))
    found = device == "cpu" or torch.cuda.is_available()
    require(found, "device", "one this machine has", device)
    require(math.isfinite(seconds) and seconds < 1e9, "seconds", "a finite number", seconds)


def _check_outputs(json: Path | None, picture: Path | None) -> None:
    """Every file that is written, also those beside the ones asked for."""
    rows = (
        {}
        if json is None
        else {
            "json": json,
            "json's journal": json.with_suffix(".jsonl"),
            "json's older journal": json.with_suffix(".jsonl.old"),
        }
    )
    source = {} if json is None else {"json's provenance": json.with_suffix(".provenance.json")}
    drawn = {} if picture is None else {"picture": picture}
    for outputs, mine in ((rows, _is_rows), (source, _is_provenance), (drawn, _is_picture)):
        require_writable(outputs, mine)
    places = [path.resolve() for path in (*rows.values(), *source.values(), *drawn.values())]
    distinct = len(set(places)) == len(places)
    require(distinct, "picture", "another file than --json and what lies beside it", picture)


def _is_rows(path: Path) -> None:
    """Raise ValueError unless ``path`` holds benchmark rows: a list, or one in each line."""
    if path.suffix not in (".jsonl", ".old"):
        _require_rows(read_json(path))
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not whole:  # a journal begins with its first row, and a kill tears the last alone
        raise ValueError(f"{path}: no benchmark rows")
    _require_rows([parse_json(line) for line in whole])


def _is_provenance(path: Path) -> None:
    """Raise ValueError unless ``path`` says where benchmark rows came from."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"device", "versions", "commit"} <= content.keys():
        raise ValueError(f"{path}: no provenance")


def _is_picture(path: Path) -> None:
    """Raise ValueError unless ``path`` is a PNG."""
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            raise ValueError(f"{path}: no PNG")


def _require_rows(rows: Any) -> None:
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and r.keys() >= _ROW for r in rows
    ):
        raise ValueError("no benchmark rows")
