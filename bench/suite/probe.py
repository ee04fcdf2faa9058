"""Small steps of the GPU suite, each its own process: ``bench.suite.probe record|load|build|tune``.

Each writes its facts as JSON where ``--json`` says, also when it fails half way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import ROOT
from sensikernels._core import extension
from sensikernels._core.errors import SensiError
from sensikernels._core.products import float32_products
from sensikernels.bench.rows import provenance, write_json

LIBRARY = ROOT / "sensikernels" / extension._LIBRARY.name


def record(given: argparse.Namespace) -> dict[str, Any]:
    """Device, driver, versions, commit, and which backends can be used."""
    from sensikernels.cli import doctor

    with float32_products(given.device):
        facts = doctor.report()
        del facts["platform"]  # a kernel's name may name whose machine it is
        return {"provenance": provenance(given.device), "doctor": facts}


def load(given: argparse.Namespace) -> dict[str, Any]:
    """Load a compiled library, say what it was built from, and run a step of each kernel in it."""
    extension._LIBRARY = given.library.resolve()
    reason = extension.why_not()
    if reason is not None:
        raise SensiError(reason)
    facts: dict[str, Any] = {"library": given.library.name, "built": extension.build_info()}
    if given.device == "cuda" and not facts["built"]["cuda_archs"]:
        raise SensiError("it holds no CUDA kernels")
    from bench.suite.kernels import run_all

    return facts | {"kernels": run_all(given.device)}


def build(given: argparse.Namespace) -> dict[str, Any]:
    """Compile into ``--into``; put the library in its place if it loads, or none is there."""
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(given.into)]
    done = subprocess.run(command, cwd=ROOT)
    facts: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    library = given.into / "sensikernels" / LIBRARY.name
    if done.returncode or not library.exists():
        raise SensiError(f"setup.py build_ext: exit {done.returncode}, {facts['seconds']} s")
    check = [sys.executable, "-m", __spec__.name, "load", "--library", str(library)]
    found = given.into / "load.json"
    loaded = subprocess.run([*check, "--device", given.device, "--json", str(found)], cwd=ROOT)
    facts |= json.loads(found.read_text())
    facts["spills"] = _spills(ROOT / "build" / "ptxas.log")
    if loaded.returncode:
        raise SensiError(f"built in {facts['seconds']} s, but: {facts['error']}")
    if given.device == "cuda" or not LIBRARY.exists():
        partial = LIBRARY.with_name(f".{LIBRARY.name}.{os.getpid()}")
        shutil.copy2(library, partial)
        partial.replace(LIBRARY)
    return facts


def _spills(report: Path) -> int | None:
    """Kernels that spill registers, by ptxas; None without its report."""
    if not report.exists():
        return None
    lines = (line for line in report.read_text().splitlines() if "bytes spill stores" in line)
    return sum(" 0 bytes spill stores" not in line for line in lines)


def tune(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the tables of ``backend="auto"``; ``--tokens`` restricts them, for a dry run."""
    from sensikernels.nn.tune import tune as measure

    path = given.into / "dispatch.json"
    measure(given.device, path, tokens=given.tokens, progress=lambda line: print(line, flush=True))
    return {p.stem: json.loads(p.read_text()) for p in sorted(given.into.glob("*.json"))}


def main() -> int:
    """Run one probe; exit code 1 where it fails, with the reason in its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("probe", choices=("record", "load", "build", "tune"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*")
    given = parser.parse_args()
    if given.into is not None:
        given.into.mkdir(parents=True, exist_ok=True)
    try:
        facts = globals()[given.probe](given)
    except (SensiError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).strip() or type(error).__name__
        write_json(given.json, {"error": reason.splitlines()[0]})
        print(reason)
        return 1
    write_json(given.json, facts)
    print(json.dumps(facts, indent=1)[:4000])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
