"""Random parameters, kept descriptions and gradients of the subset AdamW tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.bits import pack_bits
from sensikernels.ops.subset_adamw.kept import matrix_shape

BACKENDS = ("reference", "native") if extension.available() else ("reference",)
KINDS = ("all", "rows", "columns", "blocks", "elements")


def kept_of(kind: str, shape: tuple[int, ...], seed: int, share: float = 0.5) -> Any:
    """A random ``kept`` of a kind; None where the shape has no such kind."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = matrix_shape(torch.Size(shape))
    numel = rows * columns

    def some(units: int) -> Tensor:
        return (torch.rand(units, generator=generator) < share).nonzero().flatten().int()

    if kind == "rows":
        return ("rows", some(rows))
    if kind == "columns" and len(shape) > 1:
        return ("columns", some(columns))
    if kind == "blocks":
        high = next(h for h in (4, 3, 2, 1) if rows % h == 0)
        wide = next(w for w in (8, 5, 3, 2, 1) if columns % w == 0)
        return ("blocks", some(rows // high * (columns // wide)), (high, wide))
    if kind == "elements":
        return ("elements", pack_bits(torch.rand(numel, generator=generator) < share))
    return None


def bits(tensor: Tensor) -> Tensor:
    """The raw bits, for comparison that tells -0 from 0 and a NaN from another."""
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}
    return tensor.detach().contiguous().view(-1).view(wide[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
