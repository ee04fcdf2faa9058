"""One command on a GPU: build, prove, measure, draw. ``bash bench/gpu_suite.sh --help``.

Every step is a process of its own with its own time limit. One that fails, hangs or does not fit
into the time left takes nothing else down, and what has been measured is in the output folder
after each step: at most eight files, none larger than a few MiB.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from bench import ROOT
from bench.suite.report import Report
from bench.suite.steps import SECONDS, WEIGHTS, Options, Step, steps
from sensikernels.bench import rows

RESERVE = 6.0
"""Seconds kept for the summary and the pictures."""
MINUTES = {("cpu", True): 2.8, ("cpu", False): 60.0, ("cuda", True): 9.0, ("cuda", False): 60.0}
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``status``: ok, failed, timed out or skipped; ``reason`` says why it is not ok."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0


class Stopped(BaseException):
    """The suite itself was asked to end."""


def run_step(step: Step, work: Path, limit: float) -> Outcome:
    """Run one step for at most ``limit`` seconds; its output goes to ``<name>.log``."""
    log = work / f"{step.name}.log"
    seconds = f"{max(1.0, limit - step.slack):.0f}"
    command = [seconds if word == SECONDS else word for word in step.command]
    environment = {**os.environ, **step.environment, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with open(log, "w") as out:
        try:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(name=step.name, status="failed", reason=str(error))
        try:
            code = child.wait(limit)
            status = "failed" if code else "ok"
            reason = f"exit {code}: {last_line(log)}" if code else ""
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"after {limit:.0f} s, at: {last_line(log)}"
        finally:
            end_group(child)
    took = round(time.monotonic() - start, 1)
    return Outcome(name=step.name, status=status, reason=reason, seconds=took)


def end_group(child: subprocess.Popen[bytes], patience: float = 3.0) -> None:
    """End a process and whatever it started: asked first, then forced."""
    for sign, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 2.0)):
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            break
        until = time.monotonic() + wait
        while time.monotonic() < until and _alive(child):
            time.sleep(0.05)
    child.wait()


def _alive(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def last_line(log: Path) -> str:
    """The last line a step printed, cut to a readable length."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")[:300]


def run_all(todo: Sequence[Step], work: Path, report: Report, deadline: float, say: Say) -> None:
    """Every step that fits before ``deadline`` (monotonic seconds), each reported as it ends."""
    for place, step in enumerate(todo, 1):
        left = deadline - time.monotonic() - RESERVE
        if step.skip:
            done = Outcome(name=step.name, status="skipped", reason=step.skip)
        elif left < step.needs:
            why = f"{max(left, 0):.0f} s left, it needs {step.needs:.0f} s"
            done = Outcome(name=step.name, status="skipped", reason=why)
        else:
            say(f"[{place}/{len(todo)}] {step.name} …")
            done = run_step(step, work, min(step.limit, left))
            if done.status == "timed out" and left < step.limit:
                # It had less than its own limit: the suite's time is over, the step not at fault.
                done = replace(done, status="skipped", reason=f"cut short: {done.reason}")
        seconds = f" {done.seconds:.1f} s" if done.seconds else ""
        say(f"[{place}/{len(todo)}] {step.name}: {done.status}{seconds} {done.reason}".rstrip())
        report.add(step, vars(done))


def speaker() -> Say:
    """Prints lines; by rich where it is installed, so that states have colours on a terminal."""
    if importlib.util.find_spec("rich") is None:
        return lambda line: print(line, flush=True)
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    colours = {": ok": "green", ": failed": "red", ": timed out": "red", ": skipped": "yellow"}

    def say(line: str) -> None:
        style = next((colour for state, colour in colours.items() if state in line), None)
        console.print(line, style=style, markup=False)

    return say


def _stop(signum: int, _: FrameType | None) -> None:
    raise Stopped(signal.Signals(signum).name)


def _arguments() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_suite.sh", description=__doc__, formatter_class=shape)
    parser.add_argument("--quick", action="store_true", help="what ten minutes can hold")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-suite"))
    parser.add_argument("--minutes", type=float, help="for everything (quick: 9; cpu quick: 2.8)")
    parser.add_argument("--only", default="", help="comma-separated step names")
    parser.add_argument("--except", dest="without", default="", help="step names to leave out")
    parser.add_argument("--bundle", type=Path, help="weights and data made by bench.suite.bundle")
    parser.add_argument("--data-dir", type=Path, help="GLUE's folders")
    parser.add_argument("--library", type=Path, help="a libsensikernels.so built elsewhere")
    parser.add_argument("--commit", help="where there is no git: the commit[-dirty] this is")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    return parser.parse_args()


def _options(given: argparse.Namespace, work: Path) -> Options:
    bundle = None if given.bundle is None else given.bundle.resolve()
    data = given.data_dir
    if data is None and bundle is not None and (bundle / "glue").is_dir():
        data = bundle / "glue"
    if bundle is not None and (bundle / WEIGHTS).is_dir():
        paths = [str(bundle), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    options = Options(
        device=given.device,
        quick=given.quick,
        work=work,
        bundle=bundle,
        data_dir=None if data is None else data.resolve(),
    )
    if given.library is None:
        return options
    return Options(**{**vars(options), "library": given.library.resolve()})


def _chosen(todo: Sequence[Step], given: argparse.Namespace) -> list[Step]:
    only, without = ({n for n in w.split(",") if n} for w in (given.only, given.without))
    unknown = (only | without) - {step.name for step in todo}
    if unknown:
        names = ", ".join(step.name for step in todo)
        raise SystemExit(f"steps: expected some of {names}, got {', '.join(sorted(unknown))}")
    return [s for s in todo if (not only or s.name in only) and s.name not in without]


def main() -> int:
    """Exit code 0 when no step failed (skipped for lack of time is no failure), 124 if stopped."""
    given = _arguments()
    if given.device == "cuda" and not (given.list or torch.cuda.is_available()):
        raise SystemExit("gpu_suite.sh: no CUDA device; --device cpu is a dry run")
    start = time.monotonic()
    minutes = given.minutes or MINUTES[given.device, given.quick]
    if given.commit:
        os.environ[rows.COMMIT] = given.commit
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    work = Path(tempfile.mkdtemp(prefix="sensikernels-suite-"))
    say = speaker()
    try:
        todo = _chosen(steps(_options(given, work)), given)
        if given.list:
            print("\n".join(f"{s.name:<22} {s.skip or f'{s.limit:.0f} s'}" for s in todo))
            return 0
        report = Report(output=given.output, work=work, device=given.device, quick=given.quick)
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, _stop)
        stopped = False
        try:
            run_all(todo, work, report, start + 60 * minutes, say)
        except Stopped as signal_name:
            stopped = True
            say(f"stopped by {signal_name}")
        failed = report.finish()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    took = time.monotonic() - start
    say(report.text())
    say(f"{given.output}: {', '.join(report.files())}; {took:.0f} s of {60 * minutes:.0f} s")
    if stopped:
        return 124
    if failed:
        say(f"not ok: {', '.join(failed)}")
    return 1 if failed else 0
