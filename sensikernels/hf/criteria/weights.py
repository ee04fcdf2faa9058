"""Scores from weights and their gradients, through one batched reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sensikernels.masks.structure import Coupling
from sensikernels.ops.group_reduce import GroupTable, group_reduce


def unit_table(couplings: Sequence[Coupling], weights: Mapping[str, Tensor]) -> GroupTable:
    """A table to hold for several calls of ``unit_sums`` on the same weights."""
    members = [m for c in couplings for m in c.members]
    groups = ["row" if m.axis == 0 else "column" for m in members]
    return GroupTable([weights[m.module] for m in members], groups=groups)


def unit_sums(
    couplings: Sequence[Coupling],
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor] | None,
    statistic: str,
    table: GroupTable | None = None,
) -> dict[str, Tensor]:
    """``statistic`` of every unit: summed over its rows and columns in all its linears.

    ``weights`` and ``grads`` are ``[out_features, in_features]`` by module name. Returns float64
    ``[units]`` by coupling name. ``sum_abs_wg`` is the first-order loss change Σ|w·g| (Molchanov
    et al. 2017, arXiv 1611.06440); ``sum_abs_weight`` is magnitude. ``table``: of ``unit_table``.
    """
    members = [(c, m) for c in couplings for m in c.members]
    sums = group_reduce(
        [weights[m.module] for _, m in members],
        None if grads is None else [grads[m.module] for _, m in members],
        statistics=(statistic,),
        table=unit_table(couplings, weights) if table is None else table,
    )
    totals = {c.name: torch.zeros(c.units, dtype=torch.float64) for c in couplings}
    for index, (coupling, member) in enumerate(members):
        lines = sums.view(statistic, index).double().cpu()
        bands = lines.view(member.repeats, coupling.units, coupling.unit_size)
        totals[coupling.name] += bands.sum((0, 2))
    return totals
