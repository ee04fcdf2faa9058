"""Benchmark files of the working tree against a commit's: ``python -m bench.compare``.

``--base REV`` (default HEAD) names the commit, ``--limit`` the share of speed a row may lose before
the comparison fails. Only rows both sides have are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import ROOT

RESULTS = ROOT / "bench" / "results"
KEY = (
    "suite",
    "case",
    "candidate",
    "baseline",
    "pattern",
    "density",
    "block",
    "tokens",
    "in_features",
    "out_features",
    "dtype",
    "direction",
    "l2",
)


def by_key(text: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of a result file by what they measure; empty for a file of another kind."""
    rows = json.loads(text)
    if not isinstance(rows, list) or not rows or "ratio" not in rows[0]:
        return {}
    return {tuple(row.get(name, "") for name in KEY): row for row in rows}


def committed(path: Path, base: str) -> str | None:
    """The file as ``base`` has it; None where it has none."""
    relative = path.relative_to(RESULTS.parent.parent)
    done = subprocess.run(
        ("git", "-C", str(RESULTS), "show", f"{base}:{relative}"), capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else None


def compare(path: Path, base: str, limit: float) -> tuple[int, int]:
    """Print the rows that lost more than ``limit``; returns (compared, lost)."""
    text = committed(path, base)
    old, new = by_key(text or "[]"), by_key(path.read_text())
    both = [key for key in new if key in old]
    lost = [key for key in both if new[key]["ratio"] < old[key]["ratio"] * (1 - limit)]
    for key in lost:
        label = " ".join(str(part) for part in key if part not in ("", 0))
        print(f"{path.name}: {label}: x{old[key]['ratio']:.2f} -> x{new[key]['ratio']:.2f}")
    return len(both), len(lost)


def main() -> int:
    """Exit code 1 when a row lost more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="HEAD")
    parser.add_argument("--limit", type=float, default=0.05)
    given = parser.parse_args()
    files = [p for p in sorted(RESULTS.glob("*/*.json")) if p.parent.name != "aot"]
    counts = [compare(path, given.base, given.limit) for path in files]
    compared, lost = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    print(f"{compared} rows compared with {given.base}, {lost} slower by over {given.limit:.0%}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
