"""Budgeted fine-tuning: a loop of its own, and a callback for ``transformers.Trainer``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensikernels.training.callback import SensiCallback as SensiCallback
    from sensikernels.training.config import Settings as Settings
    from sensikernels.training.loop import finetune as finetune
    from sensikernels.training.loop import rank as rank
    from sensikernels.training.loop import step_costs as step_costs

_HOMES = {
    "SensiCallback": "callback",
    "Settings": "config",
    **dict.fromkeys(["finetune", "rank", "step_costs"], "loop"),
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
