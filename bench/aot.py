"""Compile every Triton kernel for GPUs that are not here, and refuse what got worse.

``python -m bench.aot`` compiles each case of every ``AOT_CASES`` list in
``sensikernels/ops/*/triton*.py`` for each target, reads the machine code, and compares with the
tables in ``bench/results/aot/<target>.json``. Exit code 1: a case broke a limit, got worse, or is
not in the table (``--update`` rewrites the tables; a case that breaks a limit gets no row).

A case is a dict:

- ``kernel``: the ``triton.jit`` function; ``gemm``: it must use the tensor cores and asynchronous
  copies (False: only stack, spills and shared memory are checked); optional ``name``: unique, by
  default made of the kernel, its pointers' types and its constexprs;
- ``signature``: argument -> ``"*bf16"``, ``"i32"``, ``"tensordesc<bf16[64, 64]>"`` (run-time
  arguments only); ``constexprs``: argument -> value; optional ``divisible``: the arguments a launch
  would find divisible by 16, by default the pointers (without them the report describes a kernel
  that nobody runs);
- ``num_warps``, ``num_stages``; optional ``targets``: a subset of ``TARGETS``; optional
  ``wgmma``: False where the tile is too small for it; optional ``asynchronous``: False where the
  loads are by element.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sensikernels
from bench import ROOT

RESULTS = ROOT / "bench" / "results" / "aot"
OPS = Path(sensikernels.__file__).parent / "ops"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU to compile for; ``shared`` is bytes of shared memory a block may have."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: str
    registers: int = 255


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp=32, shared=163 << 10, matrix="HMMA"),
    "sm_90": Target(backend="cuda", arch=90, warp=32, shared=227 << 10, matrix="HGMMA"),
    "sm_100": Target(backend="cuda", arch=100, warp=32, shared=227 << 10, matrix="UTCHMMA"),
    "gfx942": Target(backend="hip", arch="gfx942", warp=64, shared=64 << 10, matrix="MFMA"),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one compiled kernel needs; ``matrix`` and ``copies`` count instructions."""

    case: str
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: int
    copies: int
    instructions: int


def collect() -> list[dict[str, Any]]:
    """Every case of every op, in a fixed order."""
    cases: list[dict[str, Any]] = []
    for path in sorted(OPS.glob("*/triton*.py")):
        module = importlib.import_module(f"sensikernels.ops.{path.parent.name}.{path.stem}")
        cases += [{"name": _name(case), **case} for case in getattr(module, "AOT_CASES", [])]
    names = [case["name"] for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SystemExit(f"AOT_CASES: expected unique names, got twice: {', '.join(twice)}")
    return cases


def _name(case: Mapping[str, Any]) -> str:
    types = [kind[1:] for kind in case["signature"].values() if kind.startswith("*")]
    sizes = [f"{name}={value}" for name, value in case["constexprs"].items()]
    return "/".join([case["kernel"].__name__, "-".join(dict.fromkeys(types)), *sizes])


def compile_case(case: Mapping[str, Any], target: Target) -> Report:
    """Compile one case and count what its machine code does."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = case["kernel"]
    order = {name: i for i, name in enumerate(kernel.arg_names)}
    signature = {name: case["signature"].get(name, "constexpr") for name in order}
    pointers = [name for name, kind in case["signature"].items() if kind.startswith("*")]
    divisible = case.get("divisible", pointers)
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(case["constexprs"]),
        attrs={(order[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    if target.backend == "hip":
        options = {"num_warps": case["num_warps"], "num_stages": min(case["num_stages"], 2)}
    compiled = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp), options=options
    )
    read = _read_amd if target.backend == "hip" else _read_nvidia
    return Report(case=case["name"], shared=compiled.metadata.shared, **read(compiled.asm))


def _read_nvidia(asm: Mapping[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise SystemExit(f"cuobjdump -res-usage: expected REG and STACK, got {usage!r}")
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(word in ("STL", "LDL") for word in words),
        "matrix": sum(word in ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA") for word in words),
        "copies": sum(word in ("LDGSTS", "UTMALDG", "UBLKCP") for word in words),
        "instructions": len(words),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, int]:
    code = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    words = re.findall(r"^\s+([a-z]+_\w+)", code, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "matrix": sum(word.startswith("v_mfma") for word in words),
        "copies": sum("_load_" in word for word in words),
        "instructions": len(words),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    done = subprocess.run((str(path), *arguments), capture_output=True, text=True, check=True)
    return done.stdout


def broken_limits(case: Mapping[str, Any], report: Report, target: Target) -> Iterator[str]:
    """What this kernel must not do on any version of the compiler."""
    if report.stack:
        yield f"stack of {report.stack} bytes"
    if report.spills:
        yield f"{report.spills} spill instructions"
    if report.shared > target.shared:
        yield f"{report.shared} bytes of shared memory, the device has {target.shared}"
    if case["gemm"] and case.get("wgmma", True) and not report.matrix:
        yield f"no {target.matrix}"
    if case["gemm"] and case.get("asynchronous", True) and not report.copies:
        yield "no asynchronous copy"


def regressions(old: Mapping[str, int], new: Report) -> Iterator[str]:
    """What got worse since the table was written (same compiler)."""
    slack = {"registers": 8, "shared": 0, "instructions": old["instructions"] // 10}
    for name, more in slack.items():
        got = getattr(new, name)
        if got > old[name] + more:
            yield f"{name}: {old[name]} -> {got}"
    for name in ("matrix", "copies"):
        if getattr(new, name) * 2 < old[name]:
            yield f"{name}: {old[name]} -> {getattr(new, name)}"


@cache
def _by_name() -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in collect()}


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
        if only in case and target in about.get("targets", TARGETS)
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
    """What differs from the committed table; nothing where another compiler wrote it."""
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
        rows = [{"target": name, **asdict(r)} for name, rows in reports.items() for r in rows]
        options.json.write_text(json.dumps(rows, indent=1))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
