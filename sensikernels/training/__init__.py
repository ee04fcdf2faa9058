"""Budgeted fine-tuning: a loop of its own, and a callback for ``transformers.Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensikernels._core.lazy import resolver

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

__getattr__ = resolver(__name__, _HOMES)
