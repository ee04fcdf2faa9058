"""How much may be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensikernels._checks import require, require_one_of

SCOPES = ("global", "per_layer")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of three: a share of FLOPs, a share of parameters, or counts of kept units.

    ``flops``: share (0, 1] of the dense training step's FLOPs per token.
    ``params``: share (0, 1] of the structure's parameters (embeddings not counted).
    ``units``: kept units by kind, e.g. ``{"heads": 36, "neurons": 4608}``: in the whole model
    with scope ``global``, in each layer with scope ``per_layer``.

    Raises:
        UsageError: none or several given, a share outside (0, 1], a negative count.
    """

    flops: float | None = None
    params: float | None = None
    units: Mapping[str, int] | None = None
    scope: str = "global"

    def __post_init__(self) -> None:
        given = [k for k in ("flops", "params", "units") if getattr(self, k) is not None]
        require(len(given) == 1, "budget", "exactly one of flops, params, units", given or "none")
        for name in ("flops", "params"):
            share = getattr(self, name)
            ok = share is None or (isinstance(share, (int, float)) and 0 < share <= 1)
            require(ok, f"budget {name}", "a share above 0 and at most 1", share)
        for kind, count in (self.units or {}).items():
            ok = isinstance(count, int) and count >= 0
            require(ok, f"budget units[{kind!r}]", "a count of at least 0", count)
        require_one_of(self.scope, "budget scope", SCOPES)

    @property
    def requested(self) -> float | dict[str, int]:
        """The number that was asked for."""
        if self.units is not None:
            return dict(self.units)
        share = self.flops if self.flops is not None else self.params
        assert share is not None
        return share

    @property
    def measure(self) -> str:
        """``flops``, ``params`` or ``units``."""
        return next(k for k in ("flops", "params", "units") if getattr(self, k) is not None)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; ``Budget(**…)`` reads it back."""
        return {self.measure: self.requested, "scope": self.scope}
