"""Published methods as short declarations over masks, sensitivities and the optimizer."""

from __future__ import annotations

from typing import Any

from sensikernels._core.checks import require_one_of
from sensikernels.methods.base import Method, Run
from sensikernels.methods.bitfit import BitFit
from sensikernels.methods.dense import Dense
from sensikernels.methods.dps import DPS
from sensikernels.methods.freeze import Freeze
from sensikernels.methods.sensi_bert import SensiBert

METHODS: dict[str, type[Method]] = {m.name: m for m in (Dense, SensiBert, BitFit, DPS, Freeze)}

__all__ = ["DPS", "METHODS", "BitFit", "Dense", "Freeze", "Method", "Run", "SensiBert", "method"]


def method(name: str, **options: Any) -> Method:
    """A method by its name in ``METHODS``. Raises UsageError for another name."""
    require_one_of(name, "method", METHODS)
    return METHODS[name](**options)
