"""Ranking numbers of every unit of a structure: higher means keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.masks.structure import Structure


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One score per unit: ``values[coupling.name]`` is float ``[coupling.units]`` on the CPU.

    ``statistic`` names what was summed (``sum_batch_grad_squared``, …), ``rows`` how many
    examples went into it, ``sequence_length`` the padded length of their batches.

    Raises:
        UsageError: a coupling has no values or the wrong number of them.
    """

    structure: Structure
    values: Mapping[str, Tensor]
    criterion: str
    statistic: str
    rows: int = 0
    sequence_length: float = 128.0

    def __post_init__(self) -> None:
        for coupling in self.structure.couplings:
            got = self.values.get(coupling.name)
            count = None if got is None else got.numel()
            require(count == coupling.units, f"scores of {coupling.name}", coupling.units, count)

    def per_tensor(self) -> dict[str, float]:
        """Each coupling's summed score per training FLOP: the ranking of tensors.

        Source: methods.md §1.3 B.1, S_t = Σ_j I_j / Σ_j c_j.
        """
        length = self.sequence_length
        return {
            c.name: float(self.values[c.name].double().sum()) / (c.flops(length) * c.units)
            for c in self.structure.couplings
        }

    def reversed(self) -> Scores:
        """The opposite ranking, a control."""
        negated = {name: -value for name, value in self.values.items()}
        lowest = min(float(value.min()) for value in negated.values())
        shifted = {name: value - lowest for name, value in negated.items()}
        return replace(self, values=shifted, criterion=f"reversed {self.criterion}")

    def random(self, seed: int) -> Scores:
        """Uniform random scores, a control."""
        generator = torch.Generator().manual_seed(seed)
        values = {
            c.name: torch.rand(c.units, generator=generator) for c in self.structure.couplings
        }
        return replace(self, values=values, criterion="random", statistic="uniform")
