"""A warning when a model with a plan applied is saved as if it were whole."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


class _Warned:
    """``save_pretrained`` of a model whose layers are trimmed, put on the instance."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.said = model, False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.said:
            self.said = True
            warnings.warn(
                "save_pretrained: a plan is applied, so the weights saved have the trimmed shapes "
                "and from_pretrained will not load them; save sensikernels.compact(model) instead",
                stacklevel=2,
            )
        kind: Any = type(self.model)
        return kind.save_pretrained(self.model, *arguments, **named)


def warn_of_saving(model: nn.Module) -> None:
    """Have ``model.save_pretrained`` warn, once, until ``stop_warning``."""
    if hasattr(model, "save_pretrained") and "save_pretrained" not in vars(model):
        object.__setattr__(model, "save_pretrained", _Warned(model))


def stop_warning(model: nn.Module) -> None:
    """Undo ``warn_of_saving``."""
    if isinstance(vars(model).get("save_pretrained"), _Warned):
        object.__delattr__(model, "save_pretrained")
