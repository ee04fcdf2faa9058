"""The repository around this package: commands that work on it import ``ROOT`` from here.

An installed package has none; then such a command ends here, in one line.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "setup.py").exists():
    raise SystemExit("sensikernels: error: this command works on the repository: run it from there")
