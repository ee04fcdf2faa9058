"""Published methods as short declarations over masks, sensitivities and the optimizer."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from sensikernels._core.checks import require_one_of
from sensikernels.methods.base import Method, Run
from sensikernels.methods.bitfit import BitFit
from sensikernels.methods.dense import Dense
from sensikernels.methods.dps import DPS
from sensikernels.methods.freeze import Freeze
from sensikernels.methods.sensi_bert import SensiBert

# Every module of this package is read, so that a new method is one file.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
METHODS: dict[str, type[Method]] = {m.name: m for m in Method.__subclasses__()}
"""Every method by its name."""

DEFAULT = SensiBert.name
BASELINE = Dense

__all__ = [
    "BASELINE",
    "DEFAULT",
    "DPS",
    "METHODS",
    "BitFit",
    "Dense",
    "Freeze",
    "Method",
    "Run",
    "SensiBert",
    "method",
    "options_of",
]


def method(name: str, **options: Any) -> Method:
    """A method by its name in ``METHODS``. Raises UsageError for another name."""
    require_one_of(name, "method", METHODS)
    return METHODS[name](**options)


def options_of(name: str) -> dict[str, tuple[Any, str]]:
    """Default and help text of each option of a method."""
    require_one_of(name, "method", METHODS)
    return {
        f.name: (f.default, f.metadata["help"])
        for f in fields(METHODS[name])
        if "help" in f.metadata
    }
