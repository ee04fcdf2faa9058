"""Plain fine-tuning: the baseline."""

from __future__ import annotations

from sensikernels.methods.base import Method


class Dense(Method):
    """Every parameter trains; nothing is masked."""
