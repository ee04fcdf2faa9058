"""Interleaved timing: every contestant runs once per round, so drift hits all alike.

On a CPU the clock is the wall's. On a GPU it is the device's own, with the queue kept full, so that
a kernel's time holds no launch; where a contestant keeps the host busy for over a millisecond, as
a whole training step does, all are timed by the wall, as a user waits. Device times are L2-warm
(each call follows the same call) or, with ``SENSIKERNELS_BENCH_L2=cold``, L2-cold (each follows
a write of 256 MiB).
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sensikernels._core.timing import elapsed_ms

Run = Callable[[], object]
HOST_MS = 1.0
"""Contestants that take the host longer than this to enqueue are timed by the wall."""
FLUSH_BYTES = 256 << 20
CYCLES_PER_MS = 2_000_000
_MEASURED_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one contestant over ``n`` rounds."""

    median_ms: float
    spread: float
    """Half the distance between the 20th and 80th percentile, as a share of the median."""
    n: int
    samples_ms: tuple[float, ...]
    clock: str = "wall"
    """``wall``, or ``device`` for CUDA events."""
    l2: str = ""
    """``warm`` or ``cold`` by the device's clock, empty by the wall's."""


class _Deadline:
    """The moment after which no race goes on; None: there is none."""

    at: float | None = None


def stop_after(seconds: float | None) -> None:
    """From that many seconds on, every race ends after its first round; None: no limit."""
    _Deadline.at = None if seconds is None else time.monotonic() + seconds


def time_is_up() -> bool:
    """True once the seconds of ``stop_after`` are over."""
    return _Deadline.at is not None and time.monotonic() > _Deadline.at


def summarize(samples_ms: list[float], *, clock: str = "wall", l2: str = "") -> Timing:
    """Median and spread of at least one sample."""
    ordered = sorted(samples_ms)
    median = statistics.median(ordered)
    low, high = (ordered[int(q * (len(ordered) - 1) + 0.5)] for q in (0.2, 0.8))
    spread = (high - low) / 2 / median if median else 0.0
    return Timing(
        median_ms=median,
        spread=spread,
        n=len(ordered),
        samples_ms=tuple(samples_ms),
        clock=clock,
        l2=l2,
    )


def by_cycle(timing: Timing, length: int) -> Timing:
    """The timing with the mean of every ``length`` rounds as one sample; it has one at least."""
    samples = timing.samples_ms
    starts = range(0, len(samples) - length + 1, length)
    means = [statistics.fmean(samples[at : at + length]) for at in starts]
    return summarize(means, clock=timing.clock, l2=timing.l2)


def time_once(run: Run, device: str = "cpu") -> float:
    """Milliseconds of one call by the wall, the device idle before and after."""
    return elapsed_ms(run, device)


class DeviceClock:
    """Milliseconds between two events around a call, the queue filled before the first."""

    def __init__(self, cold: bool) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None

    def __call__(self, run: Run, host_ms: float) -> float:
        """``host_ms``: what the host takes to enqueue the call; the device sleeps longer."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int((2.5 * host_ms + 0.05) * CYCLES_PER_MS))
        if self._other is None:
            run()
        else:
            self._other.zero_()
        self._start.record()
        run()
        self._end.record()
        torch.cuda.synchronize()
        return self._start.elapsed_time(self._end)


def enqueue_ms(run: Run) -> float:
    """Milliseconds of the host for one call, the device idle before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    took = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    return took


def interleave(
    contestants: Mapping[str, Run],
    *,
    rounds: int = 15,
    warmup: int = 2,
    device: str = "cpu",
    budget_s: float | None = None,
    seed: int = 0,
    clock: str = "auto",
) -> dict[str, Timing]:
    """Time every contestant once per round, in an order shuffled anew each round.

    ``budget_s`` ends early, after at least three rounds, once that many seconds are spent.
    ``clock``: "wall", "device" or, as the module says, "auto".
    """
    for done in range(warmup):
        if done and time_is_up():
            break
        for run in contestants.values():
            run()
    read, kind, l2 = _clock(contestants, device, clock)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    start = time.perf_counter()
    for done in range(rounds):
        spent = budget_s is not None and time.perf_counter() - start > budget_s
        if (done >= _MEASURED_ROUNDS and spent) or (done and time_is_up()):
            break
        shuffle(order)
        for name in order:
            samples[name].append(read(name))
    return {name: summarize(values, clock=kind, l2=l2) for name, values in samples.items()}


def _clock(
    contestants: Mapping[str, Run], device: str, clock: str
) -> tuple[Callable[[str], float], str, str]:
    """The function that times a contestant, and the names of clock and cache state."""
    wall = lambda name: time_once(contestants[name], device)  # noqa: E731
    if device == "cpu" or clock == "wall":
        return wall, "wall", ""
    host = {name: enqueue_ms(run) for name, run in contestants.items()}
    if clock == "auto" and max(host.values(), default=0.0) > HOST_MS:
        return wall, "wall", ""
    l2 = os.environ.get("SENSIKERNELS_BENCH_L2", "warm")
    device_clock = DeviceClock(cold=l2 == "cold")
    return lambda name: device_clock(contestants[name], host[name]), "device", l2


def paired_ratios(baseline: Timing, candidate: Timing) -> list[float]:
    """baseline / candidate of every round, ascending."""
    pairs = zip(baseline.samples_ms, candidate.samples_ms, strict=True)
    return sorted(b / c for b, c in pairs)


def median_ratio(baseline: Timing, candidate: Timing) -> float:
    """Speed-up of ``candidate``: the median over rounds of baseline / candidate."""
    return statistics.median(paired_ratios(baseline, candidate))


def ratio_band(baseline: Timing, candidate: Timing) -> dict[str, float]:
    """The 20th and 80th percentile of the rounds' ratios, for a row's ``extra``."""
    ratios = paired_ratios(baseline, candidate)
    low, high = (ratios[int(q * (len(ratios) - 1) + 0.5)] for q in (0.2, 0.8))
    return {"ratio_p20": low, "ratio_p80": high}
