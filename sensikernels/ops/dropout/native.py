"""Launcher of the compiled kernel."""

from __future__ import annotations

from torch import Tensor

from sensikernels.ops.common.columns import launcher


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``x`` with elements dropped as by the reference, to the bit; ``x`` is contiguous."""
    y = x.new_empty(x.shape)
    launcher("dropout")(x, seed, threshold, y)
    return y
