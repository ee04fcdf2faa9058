"""Step time as a budget: what each width was measured to save, and the best widths under a limit.

FLOPs and time part ways at small widths, at tile edges and where a step is not products; so the
cost of a width is looked up, not computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sensikernels._core.checks import require
from sensikernels._core.errors import DataError, UsageError
from sensikernels._core.files import one_line, read_json, sealed, unsealed, write_json
from sensikernels.masks.structure import Coupling, Structure

INNER, LAST = "inner", "last"
KINDS = ("heads", "neurons")
FORMAT = 2
_BINS = 8192  # a coupling's cost is rounded up to 1/8192 of the room: under 0.3 % for 24 couplings

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Milliseconds of a training step by width, as measured on one device.

    ``saved[position][kind][kept]``: milliseconds that a layer with ``kept`` units of ``kind`` takes
    less than an untrimmed one; ``position`` is ``last`` for the last layer, which may run on one
    token a sequence, else ``inner``. ``staircase``: a width costs what the next measured one does,
    as on a GPU, where tiles are filled or not; else costs are interpolated.
    """

    device: str
    dtype: str
    threads: int
    tokens: int
    layers: int
    units: Mapping[str, int]
    dense_ms: float
    saved: Mapping[str, Mapping[str, Mapping[int, float]]]
    staircase: bool = False

    def check(self, structure: Structure, device: str, dtype: str) -> None:
        """Raise UsageError unless measured for such a model, device and dtype."""
        units = {c.kind: c.units for c in structure.couplings}
        layers = len({c.layer for c in structure.couplings})
        got = (self.device, self.dtype, self.layers, dict(self.units))
        expected = (device, dtype, layers, units)
        require(got == expected, "costs", f"a table for {expected}", f"one for {got}")

    def share_saved(self, coupling: Coupling, kept: npt.NDArray[np.int64]) -> Floats:
        """Share of the dense step that each count of kept units saves, falling in ``kept``."""
        last = coupling.layer == self.layers - 1
        points = self.saved[LAST if last else INNER][coupling.kind]
        widths = np.array(sorted(points))
        saved = np.array([points[int(w)] for w in widths]) / self.dense_ms
        saved = _falling(np.maximum(saved, 0.0))
        if self.staircase:
            return saved[np.minimum(np.searchsorted(widths, kept), len(widths) - 1)]
        return np.interp(kept, widths, saved)

    def __post_init__(self) -> None:
        for name, least in (("threads", 0), ("tokens", 1), ("layers", 1)):
            _require_count(getattr(self, name), name, least)
        known = {kind: count for kind, count in self.units.items() if kind in KINDS}
        require(bool(known), "units", "heads or neurons", dict(self.units))
        for kind, count in self.units.items():
            _require_count(count, f"units of {kind}", 1)
        require(_is_ms(self.dense_ms) and self.dense_ms > 0, "dense_ms", "above 0", self.dense_ms)
        require(type(self.staircase) is bool, "staircase", "true or false", self.staircase)
        require(set(self.saved) == {INNER, LAST}, "saved", f"{INNER} and {LAST}", [*self.saved])
        for where, kinds in self.saved.items():
            require(set(kinds) == set(known), f"saved {where}", sorted(known), sorted(kinds))
            for kind, points in kinds.items():
                _require_points(f"saved {where} {kind}", points, known[kind])

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that ``load`` reads back."""
        return dict(vars(self))

    def save(self, path: Path) -> None:
        """Write the table as JSON, by renaming. Raises SensiError where the disk refuses."""
        write_json(path, sealed({"format": FORMAT, **self.to_json()}))

    @classmethod
    def load(cls, path: Path) -> StepCosts:
        """Read what ``save`` wrote. Raises DataError for anything else."""
        try:
            data = unsealed(read_json(path), FORMAT, "measure anew: sensikernels tune --costs")
            del data["format"]
            data["saved"] = {
                where: {
                    kind: {int(w): ms for w, ms in points.items()} for kind, points in kinds.items()
                }
                for where, kinds in data["saved"].items()
            }
            return cls(**data)
        except OSError as error:
            raise DataError(f"costs {path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = one_line(error)
            raise DataError(f"costs {path}: expected a table of step costs, got {why}") from error


def _require_points(argument: str, points: Mapping[int, float], units: int) -> None:
    for width, ms in points.items():
        _require_count(width, f"{argument} width", 0)
        require(width <= units, f"{argument} width", f"at most {units}", width)
        require(_is_ms(ms), f"{argument} {width}", "finite milliseconds", ms)
    require(units in points, argument, f"a time of all {units}", sorted(points)[-3:])


def _require_count(value: Any, argument: str, least: int) -> None:
    ok = type(value) is int and least <= value <= 1 << 53
    require(ok, argument, f"a whole number of at least {least}", f"{value!r:.40}")


def _is_ms(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e12


def _falling(values: Floats) -> Floats:
    """Halfway between the falling envelopes: noise must not make a wider layer look cheaper."""
    above = np.maximum.accumulate(values[::-1])[::-1]
    return (above + np.minimum.accumulate(values)) / 2


def check_kinds(couplings: Sequence[Coupling]) -> None:
    """Raise UsageError unless all units are of a kind whose widths are measured."""
    for coupling in couplings:
        require(coupling.kind in KINDS, "granularity", "'heads' for step_time", coupling.kind)


def fastest_widths(
    couplings: Sequence[Coupling],
    values: Sequence[Floats],
    costs: StepCosts,
    share: float,
    multiples: Mapping[str, int],
    minimums: Mapping[str, int],
) -> list[int]:
    """Kept counts per coupling: the largest summed value whose time is at most ``share`` of dense.

    ``values``: each coupling's scores, best first. A multiple-choice knapsack, solved by dynamic
    programming over 1/8192 steps of the time to give. Raises UsageError, with the smallest
    feasible share, where none fits.
    """
    check_kinds(couplings)
    choices = [_choices(c, multiples[c.kind], minimums[c.kind]) for c in couplings]
    saved = [costs.share_saved(c, kept) for c, kept in zip(couplings, choices, strict=True)]
    least = 1.0 - sum(float(s.max()) for s in saved)
    if share < least:
        raise UsageError(
            f"budget step_time: expected at least {max(least, 0.0):.4f} (the smallest feasible for "
            f"this model on this device), got {share}"
        )
    extra = [s.max() - s for s in saved]
    room = min(share - least, sum(float(e.max()) for e in extra))
    worth = [
        np.concatenate([[0.0], np.cumsum(v)])[kept] for v, kept in zip(values, choices, strict=True)
    ]
    picked = _knapsack(extra, worth, room)
    return [int(kept[i]) for kept, i in zip(choices, picked, strict=True)]


def _choices(coupling: Coupling, multiple: int, minimum: int) -> npt.NDArray[np.int64]:
    """Multiples from the minimum to all units; all units are always a choice."""
    first = min(coupling.units, -(-minimum // multiple) * multiple)
    counts = np.arange(first, coupling.units + 1, multiple)
    return counts if counts[-1] == coupling.units else np.append(counts, coupling.units)


def _knapsack(extra: list[Floats], worth: list[Floats], room: float) -> list[int]:
    """One choice per item: the most worth with Σ extra <= room."""
    step = max(room, 1e-12) / _BINS
    needs = [np.ceil(costs / step - 1e-6).astype(np.int64) for costs in extra]
    best = np.zeros(_BINS + 1)
    picks: list[npt.NDArray[np.int64]] = []
    for need, gains in zip(needs, worth, strict=True):
        after, pick = np.full_like(best, -np.inf), np.zeros(_BINS + 1, np.int64)
        for choice in np.flatnonzero(need <= _BINS):
            left = int(need[choice])
            total = best[: _BINS + 1 - left] + gains[choice]
            better = np.flatnonzero(total > after[left:]) + left
            after[better], pick[better] = total[better - left], choice
        best = after
        picks.append(pick)
    at, chosen = _BINS, []
    for need, pick in zip(reversed(needs), reversed(picks), strict=True):
        chosen.append(int(pick[at]))
        at -= int(need[chosen[-1]])
    return chosen[::-1]
