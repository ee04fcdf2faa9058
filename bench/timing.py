"""Interleaved timing: every contestant runs once per round, so drift hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one contestant over ``n`` rounds."""

    median_ms: float
    spread: float
    """Half the distance between the 20th and 80th percentile, as a share of the median."""
    n: int
    samples_ms: tuple[float, ...]


def summarize(samples_ms: list[float]) -> Timing:
    """Median and spread of at least one sample."""
    ordered = sorted(samples_ms)
    median = statistics.median(ordered)
    low, high = (ordered[int(q * (len(ordered) - 1) + 0.5)] for q in (0.2, 0.8))
    spread = (high - low) / 2 / median if median else 0.0
    return Timing(median_ms=median, spread=spread, n=len(ordered), samples_ms=tuple(samples_ms))


def time_once(run: Callable[[], object], device: str = "cpu") -> float:
    """Milliseconds of one call, the device idle before and after."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    device: str = "cpu",
    budget_s: float | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time every contestant once per round, in an order shuffled anew each round.

    ``budget_s`` ends early, after at least three rounds, once that many seconds are spent.
    """
    for _ in range(warmup):
        for run in contestants.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    start = time.perf_counter()
    for done in range(rounds):
        if budget_s is not None and done >= 3 and time.perf_counter() - start > budget_s:
            break
        shuffle(order)
        for name in order:
            samples[name].append(time_once(contestants[name], device))
    return {name: summarize(values) for name, values in samples.items()}


def median_ratio(baseline: Timing, candidate: Timing) -> float:
    """Speed-up of ``candidate``: the median over rounds of baseline / candidate."""
    pairs = zip(baseline.samples_ms, candidate.samples_ms, strict=True)
    return statistics.median(b / c for b, c in pairs)
