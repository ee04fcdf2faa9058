"""A pytest plugin: one JSON line per finished test in ``$SENSIKERNELS_BENCH_TESTS``."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

FILE = "SENSIKERNELS_BENCH_TESTS"
OUTCOMES = ("passed", "failed", "skipped")


def pytest_runtest_logreport(report: Any) -> None:
    """Write the test's call, or what stopped it before or after."""
    path = os.environ.get(FILE)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        why = "" if report.outcome == "passed" else str(report.longrepr)[-600:]
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "why": why,
            "seconds": round(report.duration, 3),
        }
        with open(path, "a") as journal:
            journal.write(json.dumps(line) + "\n")


def summary(path: Path) -> dict[str, Any]:
    """Counts, failures and the slowest of what a journal holds."""
    text = path.read_text() if path.exists() else ""
    done = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    counts = Counter(one["outcome"] for one in done)
    slowest = sorted(done, key=lambda one: -one["seconds"])[:10]
    return {
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "failures": [one for one in done if one["outcome"] == "failed"],
        "slowest": [{"test": one["test"], "seconds": one["seconds"]} for one in slowest],
        "passed_tests": sorted(one["test"] for one in done if one["outcome"] == "passed"),
    }
