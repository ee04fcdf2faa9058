"""Benchmarks of the repository: pytest-benchmark files, studies, the GPU suite, results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
