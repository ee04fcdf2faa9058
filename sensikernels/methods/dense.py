"""Plain fine-tuning: the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from sensikernels.methods.base import Method


@dataclass(kw_only=True, eq=False)
class Dense(Method):
    """Every parameter trains; nothing is masked."""
