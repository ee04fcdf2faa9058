"""The runs of a comparison: learning rates on held-out training rows, then every seed.

Each run is a process and a folder of its own, so that no run warms another's caches; one that left
its report is not run again, and one that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sensikernels._core.errors import SensiError
from sensikernels._core.files import remove
from sensikernels.compare.contestant import Contestant
from sensikernels.training import Settings, finetune

Report = Mapping[str, Any]
Progress = Callable[[str], object]
CHOICE, RUNS, MODEL = "choice", "runs", "model"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The contestants that one run serves, by the side of its report: ours, and the stock model."""

    name: str
    sides: Mapping[str, Contestant]

    @property
    def first(self) -> Contestant:
        """Whose settings the run has."""
        return next(iter(self.sides.values()))

    @property
    def fixed(self) -> bool:
        """True if no learning rate is to be chosen."""
        return all(one.rate is not None for one in self.sides.values())

    @property
    def once(self) -> bool:
        """True if the first seed is enough."""
        return all(one.once for one in self.sides.values())


@dataclass(kw_only=True, eq=False)
class Results:
    """What is known so far: grids, chosen rates and reports, by contestant.

    ``grids[contestant][rate]`` is the main metric on held-out rows, ``rates`` the chosen ones,
    ``reports[contestant]`` those of the seeds, in order.
    """

    grids: dict[str, dict[float, float]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    reports: dict[str, list[Report]] = field(default_factory=dict)


def entries(asked: Sequence[Contestant]) -> tuple[Entry, ...]:
    """The runs that serve ``asked``: the stock model's is that of ours dense, if both are there."""
    found: dict[str, dict[str, Contestant]] = {}
    for one in asked:
        found.setdefault(one.run, {})[one.side] = one
    return tuple(Entry(name=name, sides=sides) for name, sides in found.items())


def run_all(
    common: Settings,
    asked: Sequence[Contestant],
    *,
    seeds: int,
    factors: Sequence[float],
    held_out: int,
    progress: Progress,
) -> Iterator[Results]:
    """Results after each run; the last are whole.

    With several ``factors`` each method's learning rate times them is tried with the first seed on
    ``held_out`` training rows; the best (of equals the lowest) is taken. One factor tries nothing,
    nor does a contestant whose rate is given.
    Seeds go round all contestants, so that a machine that slows down slows all.
    """
    known, served = Results(), entries(asked)
    chosen = [entry for entry in served if len(factors) > 1 and not entry.fixed]
    often = sum(1 if entry.once else seeds for entry in served)
    clock = _Clock(len(chosen) * len(factors) + often, progress)
    for one in asked:
        scale = factors[0] if one.rate is None else 1.0
        known.rates[one.text] = scale * one.default_rate
    for entry in chosen:
        for factor in factors:
            rates = {
                side: one.default_rate * (factor if one.rate is None else 1.0)
                for side, one in entry.sides.items()
            }
            settings = entry.first.settings(replace(common, held_out=held_out), rates)
            folder = common.output / CHOICE / f"{_name(entry)} x{factor:g}"
            report = clock.timed(folder, entry, settings)
            for side, one in entry.sides.items():
                known.grids.setdefault(one.text, {})[rates[side]] = _value(report, side)
            yield known
        for one in entry.sides.values():
            if one.rate is not None:
                continue
            grid = known.grids[one.text]
            known.rates[one.text] = max(sorted(grid), key=lambda rate: grid[rate])
    for seed in range(common.seed, common.seed + seeds):
        for entry in served:
            if entry.once and seed > common.seed:
                continue
            rates = {side: known.rates[one.text] for side, one in entry.sides.items()}
            settings = replace(entry.first.settings(common, rates), seed=seed)
            folder = common.output / RUNS / f"{_name(entry)} seed {seed}"
            report = clock.timed(folder, entry, settings, keep=seed == common.seed)
            for one in entry.sides.values():
                known.reports.setdefault(one.text, []).append(report)
            yield known


def model_folders(common: Settings, asked: Sequence[Contestant]) -> dict[str, Path]:
    """The model that the first seed's run of each contestant left; none of the stock ones."""
    return {
        next(iter(entry.sides.values())).text: common.output
        / RUNS
        / f"{_name(entry)} seed {common.seed}"
        / MODEL
        for entry in entries(asked)
        if "planned" in entry.sides
    }


class _Clock:
    """Runs, counted, with what is left by the mean of those so far."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.progress = total, progress
        self.done, self.took = 0, 0.0
        self.fresh = 0

    def timed(
        self, folder: Path, entry: Entry, settings: Settings, *, keep: bool = False
    ) -> Report:
        """The report of one run, made now unless it is there; its model goes unless kept."""
        there = (folder / "report.json").exists()
        self.progress(f"{self.done + 1} of {self.total}: {folder.name}{self._left()}")
        start = time.perf_counter()
        report = _in_a_process(replace(settings, output=folder, resume=folder.exists()))
        self.done += 1
        if not there:
            self.took += time.perf_counter() - start
            self.fresh += 1
        if not keep:
            remove(folder / MODEL)
        name = report["metric"]["name"]
        scores = ", ".join(
            f"{one.text} {name} {100 * _value(report, side):.1f}"
            for side, one in entry.sides.items()
        )
        self.progress(f"{self.done} of {self.total}: {folder.name}: {scores}")
        return report

    def _left(self) -> str:
        if not self.fresh:
            return ""
        minutes = (self.total - self.done) * self.took / self.fresh / 60
        return f" (about {minutes:.0f} min left)"


def _in_a_process(settings: Settings) -> Report:
    """``finetune(settings)`` in a process of its own. Raises what it raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(finetune, settings).result()
        except BrokenProcessPool as error:
            why = "its process was killed (out of memory?); the same command goes on from there"
            raise SensiError(f"{settings.output}: {why}") from error


def _end_with_parent() -> None:
    """Have this process end when the one that started it does, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _value(report: Report, side: str) -> float:
    metric = report["metric"]
    value: float = metric["value" if side == "planned" else "dense_value"]
    return value


def _name(entry: Entry) -> str:
    """The entry as a folder's name."""
    return entry.name.replace("/", " epochs ").replace(":", " ").replace(",", "+")
