"""AdamW over kept entries only: the functional op and the optimizer."""

from __future__ import annotations

from sensikernels.ops.subset_adamw.api import explain, subset_adamw
from sensikernels.ops.subset_adamw.optimizer import SubsetAdamW

__all__ = ["SubsetAdamW", "explain", "subset_adamw"]
