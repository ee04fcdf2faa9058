"""Scores shared by the select_kept tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entries(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Random entries with many ties, signed zeros, infinities and NaN."""
    out = []
    for shape in shapes:
        t = torch.randn(tuple(shape))
        flat = t.view(-1)
        flat[::5] = (flat[::5] * 4).round() / 4
        flat[3::97], flat[4::97], flat[5::97] = float("nan"), float("inf"), float("-inf")
        flat[6::97], flat[7::97] = 0.0, -0.0
        out.append(t.to(dtype))
    return out
