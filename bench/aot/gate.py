"""Compile every Triton kernel for GPUs that are not here, and refuse what got worse.

``python -m bench.aot`` compiles each case of ``bench/aot/<operator>.py`` for each target, reads the
machine code, and compares with the tables in ``bench/results/aot/<target>.json``. Exit code 1: a
case broke a limit, got worse, or is not in the table (``--update`` rewrites the tables; a case that
breaks a limit gets no row).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.aot.case import Case
from bench.aot.compiler import TARGETS, Report, Target, compile_case

RESULTS = ROOT / "bench" / "results" / "aot"
OPS = tuple(
    path.stem
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if (ROOT / "sensikernels" / "ops" / path.stem).is_dir()
)
"""Folders of ``sensikernels/ops`` that have a file of cases beside this one."""


def collect() -> list[Case]:
    """Every case of every operator, in a fixed order."""
    # By name, so that an operator's file beside this one is all it takes.
    cases = [one for op in OPS for one in importlib.import_module(f"bench.aot.{op}").cases()]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SystemExit(f"cases: expected unique names, got twice: {', '.join(twice)}")
    return cases


def broken_limits(case: Case, report: Report, target: Target) -> Iterator[str]:
    """The limits that a kernel breaks, which hold for any version of the compiler."""
    if report.stack:
        yield f"stack of {report.stack} bytes"
    if report.spills:
        yield f"{report.spills} spill instructions"
    if report.shared > target.shared:
        yield f"{report.shared} bytes of shared memory, the device has {target.shared}"
    if case.gemm and case.wgmma and not report.matrix:
        yield f"no {target.matrix}"
    if case.gemm and not report.copies:
        yield "no asynchronous copy"


def regressions(old: Mapping[str, int], new: Report) -> Iterator[str]:
    """The figures that got worse since the same compiler wrote the table."""
    slack = {"registers": 8, "shared": 0, "instructions": old["instructions"] // 10}
    for name, more in slack.items():
        got = getattr(new, name)
        if got > old[name] + more:
            yield f"{name}: {old[name]} -> {got}"
    for name in ("matrix", "copies"):
        if getattr(new, name) * 2 < old[name]:
            yield f"{name}: {old[name]} -> {getattr(new, name)}"


@cache
def _by_name() -> dict[str, Case]:
    return {case.name: case for case in collect()}


def _work(item: tuple[str, str]) -> Report | str:
    name, target = item
    try:
        return compile_case(_by_name()[name], TARGETS[target])
    except Exception as error:  # a compiler error is a finding of the gate, not its end
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def run(names: list[str], only: str, jobs: int) -> tuple[dict[str, list[Report]], list[str]]:
    """Reports by target of the cases within the limits, and what is wrong with the others."""
    items = [
        (case, target)
        for target in names
        for case, about in _by_name().items()
        if only in case and target in (about.targets or TARGETS)
    ]
    reports: dict[str, list[Report]] = {name: [] for name in names}
    failures: list[str] = []
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        for (case, target), report in zip(items, pool.map(_work, items, chunksize=4), strict=True):
            if isinstance(report, str):
                failures.append(f"{target} {case}: does not compile: {report}")
                continue
            limits = list(broken_limits(_by_name()[case], report, TARGETS[target]))
            failures += [f"{target} {case}: {problem}" for problem in limits]
            if not limits:
                reports[target].append(report)
    return reports, failures


def compare(target: str, reports: list[Report], *, partial: bool) -> list[str]:
    """The differences from the committed table; of names only where another compiler wrote it."""
    import triton

    path = RESULTS / f"{target}.json"
    if not path.exists():
        return [f"{target}: no table {path.name}; write it with --update"]
    table = json.loads(path.read_text())
    known = {row["case"]: row for row in table["rows"]}
    failures = [
        f"{target} {report.case}: not in {path.name}; write it with --update"
        for report in reports
        if report.case not in known
    ]
    if not partial:
        gone = sorted(set(known) - {report.case for report in reports})
        failures += [f"{target} {name}: gone; --update drops it" for name in gone]
    if table["triton"] != triton.__version__:
        return failures
    for report in reports:
        worse = regressions(known[report.case], report) if report.case in known else ()
        failures += [f"{target} {report.case}: {problem}" for problem in worse]
    return failures


def table(reports: list[Report]) -> dict[str, Any]:
    """The rows of one target as they are written."""
    import triton

    return {"triton": triton.__version__, "rows": [asdict(report) for report in reports]}


def dump(content: Mapping[str, Any]) -> str:
    """JSON with one row per line, so that a difference reads as one."""
    head = json.dumps({k: v for k, v in content.items() if k != "rows"})[:-1]
    rows = ",\n  ".join(json.dumps(row) for row in content["rows"])
    return f'{head}, "rows": [\n  {rows}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; the exit code."""
    parser = argparse.ArgumentParser(prog="bench.aot", description=__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows here")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected unset (the gate compiles), got 1")
    if options.update and options.only:
        parser.error("--update: expected all cases, got --only")
    names = options.target or list(TARGETS)
    reports, failures = run(names, options.only, options.jobs)
    width = max((len(report.case) for rows in reports.values() for report in rows), default=4)
    print(f"{'target':7} {'case':{width}}  regs shared stack spills matrix copies instructions")
    for name, rows in reports.items():
        for r in rows:
            print(
                f"{name:7} {r.case:{width}} {r.registers:5} {r.shared:6} {r.stack:5} {r.spills:6}"
                f" {r.matrix:6} {r.copies:6} {r.instructions:12}"
            )
    if options.update:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name, rows in reports.items():
            (RESULTS / f"{name}.json").write_text(dump(table(rows)))
    else:
        for name, rows in reports.items():
            failures += compare(name, rows, partial=bool(options.only))
    if options.json:
        flat = [{"target": name, **asdict(r)} for name, rows in reports.items() for r in rows]
        options.json.write_text(json.dumps(flat, indent=1))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
