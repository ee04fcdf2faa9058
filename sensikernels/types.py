"""Frozen results shared by several layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels._core.checks import require


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The kept ones of ``n`` units, in buffers whose shapes do not depend on their number."""

    bits: Tensor
    """bool ``[n]``."""
    indices: Tensor
    """int32 ``[n]``: the kept units ascending, then ``n`` as padding."""
    counts: Tensor
    """int32 ``[segments]`` (``[1]`` without segments): kept units per segment."""

    def blocks(self, columns: int) -> tuple[Tensor, Tensor]:
        """The kept blocks of a grid ``columns`` wide, where units are its blocks, row by row.

        int32 ``[n, 2]``, (row, column) ascending, then (rows, 0) as padding; and int32 ``[1]``,
        how many are kept. Made on the device without waiting for it. Raises ``UsageError``.
        """
        n = self.indices.numel()
        require(columns > 0 and n % columns == 0, "columns", f"a divisor of {n} units", columns)
        row = self.indices.div(columns, rounding_mode="floor")
        pairs = torch.stack((row, self.indices - row * columns), dim=1)
        return pairs, self.counts.sum(dtype=torch.int32).view(1)
