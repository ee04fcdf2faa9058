"""AdamW over kept entries only, as a function; ``optim.SubsetAdamW`` holds the state."""

from __future__ import annotations

from sensikernels.ops.subset_adamw.api import explain, subset_adamw

__all__ = ["explain", "subset_adamw"]
