"""One benchmark result = one row; a file of rows carries where they came from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sensikernels import __version__
from sensikernels.bench.timing import Timing, median_ratio

COMMIT = "SENSIKERNELS_COMMIT"
"""Where there is no git: the commit, with ``-dirty`` behind it if the tree had changed."""


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


class _Journal:
    """The file that gets each row as soon as it is measured, None: none; the precision then."""

    path: Path | None = None
    precision: str | None = None


def keep_journal(path: Path | None) -> None:
    """Append every row of this process to ``path``, a JSON object a line, so a kill loses none."""
    _Journal.path = path


@contextmanager
def journal(result: Path | None) -> Iterator[None]:
    """``keep_journal`` beside ``result`` (None: none), as ``.jsonl``; dropped at the end.

    What is left of an earlier one is kept as ``.jsonl.old``.
    """
    if result is None:
        yield
        return
    path = result.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(path.name + ".old"))
    keep_journal(path)
    try:
        yield
    finally:
        keep_journal(None)
    path.unlink(missing_ok=True)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where there is no file.

    Of rows that count ``seeds`` the last of a contestant: it holds the seeds of those before it.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    last = {_contestant(one): place for place, one in enumerate(found) if "seeds" in one}
    return [one for i, one in enumerate(found) if "seeds" not in one or last[_contestant(one)] == i]


def _contestant(one: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(one.get(name) for name in ("suite", "case", "candidate", "baseline"))


def row(*, candidate_time: Timing, baseline_time: Timing, **facts: Any) -> Row:
    """A row from two interleaved timings."""
    extra = facts.pop("extra", {})
    _Journal.precision = torch.get_float32_matmul_precision()
    if candidate_time.clock == "device":
        extra = {**extra, "clock": candidate_time.clock, "l2": candidate_time.l2}
    made = Row(
        candidate_ms=candidate_time.median_ms,
        baseline_ms=baseline_time.median_ms,
        ratio=median_ratio(baseline_time, candidate_time),
        spread=max(candidate_time.spread, baseline_time.spread),
        n=candidate_time.n,
        extra=extra,
        **facts,
    )
    if _Journal.path is not None:
        with open(_Journal.path, "a") as journal:
            journal.write(json.dumps(to_dicts([made])[0], sort_keys=True) + "\n")
    return made


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

    commit, dirty = _commit()
    packages = ("torch", "triton", "transformers", "numpy")
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"sensikernels": __version__} | {name: installed(name) for name in packages},
        "commit": commit,
        "dirty": dirty,
        "float32_matmul_precision": _Journal.precision or torch.get_float32_matmul_precision(),
        **({} if device == "cpu" else {"gpu": gpu_facts()}),
    }


def gpu_facts() -> dict[str, Any]:
    """The current CUDA device: name, capability, sizes, driver and CUDA version."""
    facts = torch.cuda.get_device_properties()
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "l2_mib": facts.L2_cache_size / 2**20,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this code and whether the tree differs: from the environment, else from git."""
    given = os.environ.get(COMMIT)
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    this = Path(__file__).resolve()
    here = ("git", "-C", str(this.parent))
    if _said(*here, "ls-files", "--error-unmatch", this.name) is None:
        return None, None  # an installed package, perhaps inside somebody's repository
    commit, status = _said(*here, "rev-parse", "HEAD"), _said(*here, "status", "--porcelain")
    return commit, None if status is None else bool(status)


def _said(*command: str) -> str | None:
    """The output of a command; None if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
    """Write under a temporary name, then rename; of a list each entry is a line."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (list, tuple)) and content:
        lines = [json.dumps(_short(one), sort_keys=True) for one in content]
        text = "[\n" + ",\n".join(lines) + "\n]"
    else:
        text = json.dumps(content, indent=1, sort_keys=True)
    temporary.write_text(text + "\n")
    temporary.replace(path)


def _short(one: Any) -> Any:
    """A row's measurements to five digits: no timing holds more."""
    if not isinstance(one, dict):
        return one
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in one.items()}
