"""The course of the rates that a waiting row of a table assumes of the steps it misses."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

from torch import Tensor

_OFF = 0.005  # of the learning rate


@dataclass(frozen=True, kw_only=True)
class Line:
    """A learning rate on a straight line, everything else constant, since ``steps`` steps ago.

    ``rate`` is that of the line's first step and ``slope`` what each step adds. Kept in the group
    as a list of numbers, so that a checkpoint carries it.
    """

    rate: float
    slope: float = 0.0
    steps: int = 0
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bent: float = 0.0
    """1 where the course before was another: rows that wait do not know the slope yet."""

    @classmethod
    def begin(cls, group: dict[str, Any], *, bent: bool = False) -> Line:
        """The line of which the group's next step is the first."""
        beta1, beta2 = group["betas"]
        return cls(
            rate=_rate(group),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            bent=float(bent),
        )

    @classmethod
    def of(cls, group: dict[str, Any]) -> Line:
        """The line that the group is on."""
        saved = group.get("line")
        if saved is None:
            return cls.begin(group)
        rate, slope, steps, *rest = saved
        names = ("beta1", "beta2", "eps", "weight_decay", "bent")
        return cls(rate=rate, slope=slope, steps=int(steps), **dict(zip(names, rest, strict=True)))

    def to_list(self) -> list[float]:
        """The line as numbers that ``of`` reads back."""
        return list(astuple(self))

    def goes_on(self, group: dict[str, Any]) -> bool:
        """True if the group's next step is on this line; False for a rate in a tensor."""
        now = Line.begin(group)
        same = replace(now, rate=self.rate, slope=self.slope, steps=self.steps, bent=self.bent)
        if same != self:
            return False
        if self.steps == 1 and self.rate == 0 < now.rate:
            return False  # of a rate of 0 a clock cannot tell that it is known
        expected = self.rate + self.slope * self.steps
        off = abs(now.rate - expected)
        return self.steps < 2 or off <= _OFF * max(abs(self.rate), abs(now.rate))

    def next(self, group: dict[str, Any]) -> Line:
        """The line after the group's next step; its second gives the slope."""
        slope = _rate(group) - self.rate if self.steps == 1 else self.slope
        return replace(self, slope=slope, steps=self.steps + 1)


def _rate(group: dict[str, Any]) -> float:
    rate = group["lr"]
    return 0.0 if isinstance(rate, Tensor) else float(rate)
