"""The definition: Philox4x32-10 in plain PyTorch integers."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.philox import dropped


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``x · 65536 / threshold`` where the element's draw is below ``threshold``, else 0."""
    # Scaled in float32 at least, as the kernels do, so that all round alike.
    wide = x if x.dtype == torch.float64 else x.float()
    return dropped(wide, seed, threshold).to(x.dtype)
