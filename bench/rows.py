"""One benchmark result = one row; a file of rows carries where they came from."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sensikernels.bench.timing import Timing, median_ratio


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate against a baseline; ``ratio`` = baseline_ms / candidate_ms, above 1 is faster."""

    suite: str
    case: str
    candidate: str
    baseline: str
    pattern: str = ""
    density: float = 1.0
    block: str = ""
    tokens: int = 0
    in_features: int = 0
    out_features: int = 0
    dtype: str = ""
    direction: str = ""
    candidate_ms: float
    baseline_ms: float
    ratio: float
    spread: float
    n: int
    peak_mib: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def row(*, candidate_time: Timing, baseline_time: Timing, **facts: Any) -> Row:
    """A row from two interleaved timings."""
    return Row(
        candidate_ms=candidate_time.median_ms,
        baseline_ms=baseline_time.median_ms,
        ratio=median_ratio(baseline_time, candidate_time),
        spread=max(candidate_time.spread, baseline_time.spread),
        n=candidate_time.n,
        **facts,
    )


def device_name(device: str = "cpu") -> str:
    """A folder-safe name of the machine's device, as ``bench/results`` files it."""
    if device != "cpu":
        raw = torch.cuda.get_device_name()
    else:
        raw = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}t"
        raw = f"cpu-{platform.machine()}-{raw}"
    return "".join(c if c.isalnum() else "-" for c in raw.lower())


def cpu_model() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, device and commit behind a set of rows."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", str(Path(__file__).parent), *words),
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    packages = ("sensikernels", "torch", "triton", "transformers", "numpy")
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain rows, ``extra`` folded in."""
    flat = []
    for item in rows:
        values = asdict(item)
        flat.append({**values.pop("extra"), **values})
    return flat


def write(path: Path, rows: Sequence[Row], device: str = "cpu") -> None:
    """Write the list of rows to ``path`` and their provenance beside it, each by renaming."""
    write_dicts(path, to_dicts(rows), device)


def write_dicts(path: Path, rows: Sequence[dict[str, Any]], device: str = "cpu") -> None:
    """``write`` for rows that are plain already."""
    write_json(path, rows)
    write_json(path.with_suffix(".provenance.json"), provenance(device))


def write_json(path: Path, content: object) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
