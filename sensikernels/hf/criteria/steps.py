"""Scores of units from the weight gradients that training steps have anyway.

A unit's mask scales one band of columns of the linear that reads it, so ∂L/∂mask is Σ w·∂L/∂w over
that band: the mask gradient of a step's batch costs one reduction and no pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.masks.scores import Scores
from sensikernels.masks.structure import Coupling, Member, Structure
from sensikernels.ops.group_reduce import GroupTable, group_reduce

STATISTIC = "sum_batch_grad_squared"
_STEPS = "steps"


class StepScores:
    """Σ over steps of (∂L/∂mask)² of every unit, from the gradients of ``model``'s weights.

    The batches' losses are those of training, dropout included, and weights move between them.
    ``totals``: float64 ``[units]`` by coupling name; ``steps``: how many were added.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self.totals = {
            c.name: torch.zeros(c.units, dtype=torch.float64) for c in structure.couplings
        }
        self.steps = 0
        self._readers = [_reader(c) for c in structure.couplings]
        self._there: list[int] = []  # the readers that the table is of
        self._table: GroupTable | None = None

    @property
    def complete(self) -> bool:
        """True if every linear that is to have a gradient trains."""
        return all(linear.weight.requires_grad for linear in self._linears())

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients that are there now, all or, where one is not finite, none.

        A frozen linear's units get nothing.
        """
        linears = self._linears()
        there = [i for i, linear in enumerate(linears) if linear.weight.grad is not None]
        if not there:
            return
        weights = [linears[i].weight for i in there]
        if there != self._there:
            groups = ["row" if self._readers[i].axis == 0 else "column" for i in there]
            self._there, self._table = there, GroupTable(weights, groups=groups)
        sums = group_reduce(
            weights, [w.grad for w in weights], statistics=("sum_wg",), table=self._table
        )
        found: dict[str, Tensor] = {}
        for place, i in enumerate(there):
            coupling, linear = self.structure.couplings[i], linears[i]
            lines = sums.view("sum_wg", place).double()
            if self._readers[i].axis == 0 and linear.bias is not None:
                lines = lines + _product(linear.bias)
            units = lines[: coupling.units * coupling.unit_size].view(coupling.units, -1).sum(1)
            found[coupling.name] = units.square().cpu()
        if all(bool(values.isfinite().all()) for values in found.values()):
            self.steps += 1
            for name, values in found.items():
                self.totals[name] += values

    def state(self) -> dict[str, Tensor]:
        """What was added up so far, for a checkpoint."""
        return {**self.totals, _STEPS: torch.tensor(self.steps)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave. Raises UsageError: it is another structure's."""
        shapes = {name: tensor.shape for name, tensor in self.state().items()}
        same = {name: tensor.shape for name, tensor in tensors.items()} == shapes
        require(same, "state", f"sums of {sorted(shapes)}", sorted(tensors))
        self.totals = {name: tensors[name].clone() for name in self.totals}
        self.steps = int(tensors[_STEPS])

    def scores(self, sequence_length: float) -> Scores:
        """What was added up so far, of batches of that padded length."""
        return Scores(
            structure=self.structure,
            values={name: total.clone() for name, total in self.totals.items()},
            criterion="mask-gradient",
            statistic=STATISTIC,
            sequence_length=sequence_length,
        )

    def _linears(self) -> list[Any]:
        return [self.model.get_submodule(member.module) for member in self._readers]


def _reader(coupling: Coupling) -> Member:
    """The linear that reads a unit's activation; of Q/K dimensions the one that makes it."""
    readers = [member for member in coupling.members if member.axis == 1]
    return readers[0] if readers else coupling.members[0]


def _product(bias: Tensor) -> Tensor:
    return torch.zeros(()) if bias.grad is None else bias.double() * bias.grad.double()
