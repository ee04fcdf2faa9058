"""Frozen results shared by several layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which of ``n`` units survive, in buffers whose shapes do not depend on how many do."""

    bits: Tensor
    """bool ``[n]``."""
    indices: Tensor
    """int32 ``[n]``: the kept units ascending, then ``n`` as padding."""
    counts: Tensor
    """int32 ``[segments]`` (``[1]`` without segments): kept units per segment."""
