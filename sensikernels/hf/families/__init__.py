"""The known families of encoders. A new one is a module here that holds a ``Family``."""

from __future__ import annotations

import copyreg
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from sensikernels.hf.family import Family
from sensikernels.hf.modeling_compact import register

__all__ = ["FAMILIES", "family_named"]


def _found() -> dict[str, Family]:
    """Every family of every module of this package, so that a new one is one file."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    values = (value for module in modules for value in vars(module).values())
    return {value.name: value for value in values if isinstance(value, Family)}


FAMILIES: tuple[Family, ...] = tuple(_found().values())
"""Every family, in the order of their modules' names. A model is of the one that knows its
attention."""

for _family in FAMILIES:
    if _family.compact is not None:
        register(_family.compact.config, _family.parts())


def family_named(name: str) -> Family:
    """The family of that ``model_type``. Raises KeyError if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise KeyError(name)


def _reduced(family: Family) -> Any:
    return family_named, (family.name,)


# Pickled and copied by name: a packed model holds its family.
copyreg.pickle(Family, _reduced)
