"""The learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from sensikernels.hf.schedule import rate_factor
from sensikernels.training.config import Settings


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule by its name, a warm-up of so many steps, or a share of all of them.

    ``own``: nobody asked for one; rates are those of this package's own formula, to the bit.
    """

    name: str
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    own: bool = False

    @classmethod
    def of(cls, settings: Settings, default: str) -> Schedule:
        """The one asked for; else the method's ``default``, warmed up if that is asked for."""
        steps, ratio = settings.warmup_steps, settings.warmup_ratio
        warm = steps > 0 or ratio > 0
        if settings.schedule is None and not warm:
            return cls(name=default, own=True)
        name = settings.schedule or default
        if warm and settings.schedule is None and default == "constant":
            name = "constant_with_warmup"
        return cls(name=name, warmup_steps=steps, warmup_ratio=ratio)

    def warmup(self, max_steps: int) -> int:
        """Steps over which the rate rises from zero, rounded up as transformers does."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * max_steps)

    def rate(self, peak: float, step: int, max_steps: int) -> float:
        """The learning rate of the 0-based step, of ``peak``."""
        if self.own:
            return peak * schedule(self.name, step, max_steps)
        return peak * _factor(self.name, self.warmup(max_steps), max_steps, peak)(step)

    def to_json(self, max_steps: int) -> dict[str, Any]:
        """Name and warm-up, for the report."""
        return {"name": self.name, "warmup_steps": self.warmup(max_steps)}


def schedule(kind: str, step: int, max_steps: int) -> float:
    """Factor of the learning rate for the 0-based step: ``linear`` to zero, or ``constant``."""
    return 1.0 if kind == "constant" else max(0.0, 1 - step / max_steps)


@cache
def _factor(name: str, warmup: int, max_steps: int, peak: float) -> Callable[[int], float]:
    return rate_factor(name, warmup_steps=warmup, max_steps=max_steps, rate=peak)
