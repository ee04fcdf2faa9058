"""Optimizers with state: ``SubsetAdamW``, over the functional ``ops.subset_adamw``."""

from __future__ import annotations

from sensikernels.optim.subset_adamw import SubsetAdamW

__all__ = ["SubsetAdamW"]
