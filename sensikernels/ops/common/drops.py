"""The elements that a dropout keeps, drawn from a counter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels._core.philox import DRAWS, dropped
from sensikernels.ops.common.checks import check_tensor


class Drop(NamedTuple):
    """Elements whose 16-bit draw from ``seed`` is below ``threshold`` are kept; without a seed all.

    ``seed`` is int64 ``[]``.
    """

    seed: Tensor | None
    threshold: int

    def applied(self, x: Tensor) -> Tensor:
        """``x · 65536 / threshold`` where an element is kept, else 0; ``x`` without a seed."""
        return x if self.seed is None else dropped(x, self.seed, self.threshold)


def threshold_of(p: float, name: str = "dropout") -> int:
    """The number of 65,536 draws that are kept; ``p`` is the probability to drop an element."""
    if not 0.0 <= p <= 1.0:
        raise expected(name, "a probability in [0, 1]", p)
    return round((1.0 - p) * DRAWS)


def new_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of ``device``."""
    return torch.randint(1 << 62, (), device=device)


def drop_of(p: float, seed: Tensor | None, device: torch.device) -> tuple[Tensor | None, int]:
    """The fields of a ``Drop`` of probability ``p``, from ``seed`` or, where it is None, a new one.

    Raises UsageError where ``p`` is no probability or ``seed`` is not int64 ``[]`` on ``device``.
    """
    threshold = threshold_of(p)
    if seed is not None:
        check_tensor(seed, "seed", (), torch.int64, device)
    if threshold == DRAWS:
        return None, DRAWS
    return new_seed(device) if seed is None else seed, threshold
