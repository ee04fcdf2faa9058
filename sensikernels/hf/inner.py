"""The transformers model inside whatever a user wrapped around it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sensikernels._core.checks import expected

OWN = "_sensikernels"
"""How the names of attributes begin that this package leaves on models."""


def transformer_in(model: nn.Module) -> Any:
    """``model``, or the outermost transformers model that it holds, as a SentenceTransformer does.

    Raises UsageError if there is none.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise expected("model", "a transformers model, or one inside", type(model).__name__)
    return inner


def rewrapped(model: nn.Module, inner: nn.Module, other: nn.Module) -> nn.Module:
    """``other`` inside a copy of what ``model`` has around ``inner``; ``model`` stays as it is."""
    if inner is model:
        return other
    whole = copy.deepcopy(model, {id(inner): other})
    for name in [name for name in vars(whole) if name.startswith(OWN)]:
        object.__delattr__(whole, name)
    return whole
