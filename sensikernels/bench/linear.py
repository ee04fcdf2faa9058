"""Masked and selective linears against what else a user could run, each gated by correctness.

``python -m sensikernels.bench.linear --only candidate=auto --only tokens=1,128 …`` for a part.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sensikernels._core.products import float32_products
from sensikernels.bench.linear_cases import (
    BASELINES,
    Case,
    all_cases,
    narrowed,
    quick_cases,
    why_without,
)
from sensikernels.bench.linear_runs import Run, contestants, recording
from sensikernels.bench.roofline import achieved, roof
from sensikernels.bench.rows import Row, row, write
from sensikernels.bench.timing import Timing, interleave, summarize, time_is_up

QUICK_SECONDS = 55.0
NOISE = 0.007
"""A point is done once every ratio is known to this, by the standard error of its median."""
POINT_SECONDS = 1.0
ROUNDS = 400
DENSE_SECONDS = {"cpu": 2.0}
"""A point whose dense layer alone would take longer, at so many GFLOP/s, is left out."""
GFLOPS = {2: 350.0, 4: 200.0}  # by bytes of a number


def run(
    *,
    device: str,
    quick: bool,
    progress: Callable[[str], object],
    rounds: int | None = None,
    seconds: float | None = None,
    tokens: Sequence[int] | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    done: Sequence[Row] = (),
) -> list[Row]:
    """Every case's candidates against its baselines, interleaved.

    ``progress`` is told each case, and once why a baseline is missing. ``quick`` covers each bar
    in under a minute. A case ends when its ratios are known to ``NOISE``, after ``rounds`` at the
    latest. The full table takes over an hour on a CPU: ``seconds`` ends it early, with every shape,
    token count, dtype and direction met once; ``tokens`` takes other token counts, ``only`` keeps
    cases by their facts, candidates and baselines; cases of ``done`` rows are not measured again.
    """
    start, rows = time.perf_counter(), list(done)
    most = QUICK_SECONDS if quick else seconds
    known = {(one.case, one.dtype, one.direction) for one in done}
    every = all_cases(device, tokens) if tokens else all_cases(device)
    cases = narrowed(quick_cases() if quick else every, only or {})
    say_once = _once(progress)
    for name in BASELINES:
        linears = [case for case in every if case.direction != "grad_weight"]
        reasons = {why_without(name, case, device) for case in linears}
        if not quick and None not in reasons:
            for reason in reasons:
                say_once(f"  without {name}: {reason}")
    with float32_products(device):
        for i, case in enumerate(cases):
            left = None if most is None else most - (time.perf_counter() - start)
            facts = case.facts()
            if (facts["case"], facts["dtype"], facts["direction"]) in known:
                continue
            if time_is_up() or (left is not None and left < 0 and not quick):
                progress(f"linear: stopped before case {i + 1} of {len(cases)}")
                break
            takes = case.dense_flops / GFLOPS[case.dtype.itemsize] / 1e9
            if takes > DENSE_SECONDS.get(device, takes):
                say_once(f"  without {facts['case']} {facts['dtype']}: dense takes {takes:.1f} s")
                continue
            progress(f"linear {i + 1}/{len(cases)}: {facts['case']} {facts['dtype']}")
            rows += measure(
                case, device, rounds=rounds, left=left if quick else None, progress=say_once
            )
    return rows


def measure(
    case: Case,
    device: str,
    *,
    rounds: int | None,
    left: float | None,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Gate, then time; a baseline that does not exist for the case is left out, with its reason."""
    runs = contestants(case, device)
    for baseline in case.baselines:
        if baseline not in runs:
            progress(f"  without {baseline}: {why_without(baseline, case, device)}")
    seconds = POINT_SECONDS if left is None else max(0.3, min(POINT_SECONDS, left / 12))
    with recording(case):
        times = race(runs, case, device, rounds or ROUNDS, seconds)
    same = "compact" in times and "auto" in case.candidates  # one layer: see ``contestants``
    if same:
        times["auto"] = times["compact"]
    peak, work = roof(device, case.dtype), _work(case)
    first = next((name for name in case.baselines if name in times), "")
    return [
        row(
            candidate_time=times[candidate],
            baseline_time=times[baseline],
            candidate=candidate,
            baseline=baseline,
            extra={
                "noise": noise(times[baseline], times[candidate]),
                **(achieved(work, times[candidate], *peak) if baseline == first else {}),
            },
            **case.facts(),
        )
        for candidate, baseline in itertools.product(case.candidates, case.baselines)
        if candidate in times and baseline in times
        if not same or candidate != "auto" or baseline == "dense"
    ]


def race(
    runs: Mapping[str, Run], case: Case, device: str, rounds: int, seconds: float
) -> dict[str, Timing]:
    """``interleave``, until every candidate's ratios are known to ``NOISE`` or the time is over."""
    start, some = time.perf_counter(), min(rounds, 5)
    times = interleave(runs, rounds=some, warmup=1, device=device, budget_s=seconds)
    pairs = [(c, b) for c in case.candidates for b in case.baselines if {c, b} <= set(runs)]
    done = some
    while (
        done < rounds
        and not time_is_up()
        and time.perf_counter() - start < seconds
        and any(noise(times[b], times[c]) > NOISE for c, b in pairs)
    ):
        some = min(rounds - done, 10)
        more = interleave(runs, rounds=some, warmup=0, device=device, budget_s=0.1, seed=done)
        done += some
        times = {
            name: summarize([*one.samples_ms, *more[name].samples_ms], clock=one.clock, l2=one.l2)
            for name, one in times.items()
        }
    return times


def noise(baseline: Timing, candidate: Timing) -> float:
    """Standard error of the median ratio, as a share of it; 1 from fewer than three rounds."""
    pairs = zip(baseline.samples_ms, candidate.samples_ms, strict=True)
    ratios = [b / c for b, c in pairs]
    if len(ratios) < 3:
        return 1.0
    middle = statistics.median(ratios)
    off = statistics.median(abs(ratio - middle) for ratio in ratios)
    # 1.48 makes a deviation of the median absolute one, 1.25 a median's error of a mean's.
    return 1.25 * 1.48 * off / middle / len(ratios) ** 0.5


def _work(case: Case) -> tuple[float, float]:
    """FLOPs, and bytes of x, kept weights and y, each moved once per product."""
    density, products = case.mask().density, 3 if case.direction == "forward+backward" else 1
    kept = density * case.in_features * case.out_features
    rows = density if case.pattern in ("rows", "heads") else 1.0
    columns = density if case.pattern == "columns" else 1.0
    moved = case.tokens * (columns * case.in_features + rows * case.out_features) + kept
    return 2 * case.tokens * kept * products, moved * case.dtype.itemsize * products


def _once(say: Callable[[str], object]) -> Callable[[str], object]:
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return once


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a part of the table; with ``--below`` print only the points slower than that."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--only", action="append", default=[], metavar="FACT=VALUE,…")
    parser.add_argument("--below", type=float, metavar="RATIO")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    pairs = (one.split("=", 1) for one in given.only)
    only = {name: values.split(",") for name, values in pairs}
    rows = run(
        device=given.device,
        quick=False,
        progress=lambda line: sys.stderr.write(line + "\n"),
        seconds=given.seconds,
        tokens=given.tokens,
        only=only,
    )
    for one in rows:
        if given.below is None or one.ratio < given.below:
            sys.stdout.write(
                f"{one.case:<28} {one.dtype:<8} {one.direction:<16} {one.candidate:<12} "
                f"{one.candidate_ms:9.4f} ms  x{one.ratio:.3f} ±{one.extra['noise']:.3f} "
                f"{one.baseline}\n"
            )
    if given.json is not None:
        write(given.json, rows, given.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
