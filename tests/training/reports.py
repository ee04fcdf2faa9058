"""Reports of two runs that did the same, one of them more than once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMES = ("step_ms", "step_speedup", "tokens_per_s", "seconds", "evaluated_after")
FILES = {"model", "plan.json", "plan.safetensors", "report.json", "sensitivity.png"}


def timeless(output: Path) -> dict[str, Any]:
    """The report without times, places, and what being resumed leaves in it."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    for name in TIMES:
        del report[name]
    for name in ("output", "resume", "checkpoint_every"):
        del report["settings"][name]
    report["events"] = [e for e in report["events"] if not e.endswith(": resumed")]
    return report


def assert_same_end(output: Path, whole: Path) -> None:
    """The same report but for times, the same files, the same bytes of model and plan."""
    assert timeless(output) == timeless(whole)
    names = {p.name for p in output.iterdir()}
    assert names == {p.name for p in whole.iterdir()} <= FILES
    for path in whole.rglob("*"):
        exact = path.suffix in (".safetensors", ".json") and path.name != "report.json"
        if exact and path.is_file():
            other = output / path.relative_to(whole)
            assert other.read_bytes() == path.read_bytes(), path.name
