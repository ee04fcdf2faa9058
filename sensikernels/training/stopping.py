"""Which evaluation was the best, and when a run that no longer improves ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sensikernels._core.checks import require


@dataclass(kw_only=True)
class Best:
    """The evaluations of one model by its task's main metric, of which more is better.

    As in transformers' ``EarlyStoppingCallback``: an evaluation that is not above the best before
    it by more than ``threshold`` is one without improvement; ``patience`` of them in a row end the
    run. Any higher value is the new best. ``weights``: of the best, where they are kept.
    """

    patience: int | None = None
    threshold: float = 0.0
    step: int | None = None
    value: float | None = None
    waited: int = 0
    weights: dict[str, Tensor] | None = None

    def take(self, step: int, value: float) -> bool:
        """Count an evaluation; True if it is the best so far."""
        before = self.value
        improved = before is None or value - before > self.threshold
        self.waited = 0 if improved else self.waited + 1
        if before is not None and value <= before:
            return False
        self.step, self.value = step, value
        return True

    @property
    def exhausted(self) -> bool:
        """True if the run has waited long enough."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """What a continuation needs."""
        names = ("step", "value", "waited", "weights")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from ``state``, of a run of ``step`` steps. Raises UsageError if it is none."""
        require(state.keys() == self.state().keys(), "best", [*self.state()], [*state])
        at, waited = state["step"], state["waited"]
        known = at is None or (type(at) is int and 0 < at <= step)
        require(known and type(waited) is int and waited >= 0, "best", f"a step to {step}", at)
        for name, value in state.items():
            setattr(self, name, value)

    def to_json(self) -> dict[str, Any] | None:
        """Step and value of the best evaluation; None where none counted."""
        return None if self.step is None else {"step": self.step, "value": self.value}
