"""The known families of encoders. A new one is a module here and a row of ``FAMILIES``."""

from __future__ import annotations

import copyreg
from typing import Any

from sensikernels.hf.families.bert import BERT
from sensikernels.hf.family import Family
from sensikernels.hf.modeling_compact import register

__all__ = ["FAMILIES", "family_named"]

FAMILIES: tuple[Family, ...] = (BERT,)
"""Looked through in this order: a model belongs to the first family that knows its attention."""


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
