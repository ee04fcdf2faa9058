"""Budgets: the share or number of units that a plan may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensikernels._core.checks import require, require_one_of

SCOPES = ("global", "per_layer")
PARAMS_SCOPES = ("encoder", "model")
SHARES = ("flops", "params", "step_time")
MEASURES = (*SHARES, "units")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of four: a share of FLOPs, parameters or step time, or counts of kept units.

    ``flops``: share (0, 1] of the dense training step's FLOPs per token.
    ``params``: share (0, 1] of the structure's parameters: with ``params_scope`` ``encoder`` those
    outside the embeddings, with ``model`` all. Only heads and neurons go in either case.
    ``step_time``: share (0, 1] of the dense training step's time on the device at hand.
    ``units``: kept units by kind, e.g. ``{"heads": 36, "neurons": 4608}``: in the whole model
    with scope ``global``, in each layer with scope ``per_layer``.

    Raises:
        UsageError: none or several given, a share outside (0, 1], a negative count.
    """

    flops: float | None = None
    params: float | None = None
    step_time: float | None = None
    units: Mapping[str, int] | None = None
    scope: str = "global"
    params_scope: str = "encoder"

    def __post_init__(self) -> None:
        given = [k for k in MEASURES if getattr(self, k) is not None]
        expected = "exactly one of " + ", ".join(MEASURES)
        require(len(given) == 1, "budget", expected, given or "none")
        for name in SHARES:
            share = getattr(self, name)
            ok = share is None or (type(share) in (int, float) and 0 < share <= 1)
            require(ok, f"budget {name}", "a share above 0 and at most 1", share)
        for kind, count in (self.units or {}).items():
            ok = type(count) is int and count >= 0
            require(ok, f"budget units[{kind!r}]", "a count of at least 0", count)
        require_one_of(self.scope, "budget scope", SCOPES)
        require_one_of(self.params_scope, "budget params_scope", PARAMS_SCOPES)
        fits = self.params is not None or self.params_scope == "encoder"
        require(fits, "budget params_scope", "encoder without params", self.params_scope)
        whole = self.step_time is None or self.scope == "global"
        require(whole, "budget scope", "global for step_time", self.scope)

    @property
    def requested(self) -> float | dict[str, int]:
        """The number that was asked for."""
        if self.units is not None:
            return dict(self.units)
        share: float = getattr(self, self.measure)
        return share

    @property
    def measure(self) -> str:
        """``flops``, ``params``, ``step_time`` or ``units``."""
        return next(k for k in MEASURES if getattr(self, k) is not None)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; ``Budget(**…)`` reads it back."""
        counted = {} if self.params_scope == "encoder" else {"params_scope": self.params_scope}
        return {self.measure: self.requested, "scope": self.scope, **counted}
