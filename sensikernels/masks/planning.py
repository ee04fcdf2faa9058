"""Scores and a budget become a plan: the exact allocation over units of two kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import UsageError
from sensikernels.masks.budget import Budget
from sensikernels.masks.geometry import Geometry
from sensikernels.masks.mask import Mask
from sensikernels.masks.plans import Plan
from sensikernels.masks.scores import Scores
from sensikernels.masks.step_costs import StepCosts, fastest_widths
from sensikernels.masks.structure import Coupling, Structure
from sensikernels.masks.tensor_shares import tensor_counts
from sensikernels.ops.select_kept import select_kept

MULTIPLES: Mapping[str, int] = {"heads": 1, "dimensions": 8, "neurons": 16}
"""Kept counts are multiples of these: 16 neurons fill a tensor core tile, and few widths repeat.
Dimensions (Q/K or V/O) are counted per head."""

MINIMUMS: Mapping[str, int] = {"heads": 1, "dimensions": 8, "neurons": 16}
"""Units that every layer keeps whatever its scores."""

ALLOCATIONS = ("units", "tensors")
_MOST = 1 << 24
_FAMILY = {"qk": "dimensions", "vo": "dimensions"}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """The units of several couplings as flat arrays, ready for ``select_kept``."""

    couplings: tuple[Coupling, ...]
    scores: Tensor
    costs: Tensor
    segments: Tensor
    kinds: Tensor
    names: tuple[str, ...]


def plan(
    scores: Scores,
    budget: Budget,
    *,
    method: str = "sensi-bert",
    geometry: Geometry | None = None,
    multiples: Mapping[str, int] | None = None,
    minimums: Mapping[str, int] | None = None,
    costs: StepCosts | None = None,
    allocation: str = "units",
) -> Plan:
    """Keep the units with the largest summed score that the budget allows.

    For heads and neurons the optimum over whole chunks of ``multiples`` units is exact: for
    every number of heads the rest of the budget is filled with the best neurons (methods.md
    §1.3 B; Kwon et al. 2022, arXiv 2204.09656). ``geometry``: of the batches to train on; the
    default is sequences as long as those of the ranking. A ``step_time`` budget needs ``costs``,
    measured on the device to train on.

    ``allocation`` ``tensors`` ranks whole couplings, each of which keeps the share of its best
    units that its score per cost decides (``tensor_counts``), as the paper ranks tensors.

    Raises:
        UsageError: the budget is below the smallest feasible one, which is named; an unknown
            kind of unit; a count that is not a multiple; a step-time budget without costs, or
            with ``tensors``, as one of counts.
    """
    require_one_of(allocation, "allocation", ALLOCATIONS)
    shares = budget.measure in ("flops", "params")
    known = allocation == "units" or shares
    require(known, "allocation", f"units for a budget of {budget.measure}", allocation)
    geometry = Geometry.uniform(scores.sequence_length) if geometry is None else geometry
    length = geometry.mean_length
    multiples = {**MULTIPLES, **(multiples or {})}
    minimums = {**MINIMUMS, **(minimums or {})}
    for name, count in (*multiples.items(), *minimums.items()):
        ok = type(count) is int and 0 < count <= _MOST
        require(ok, f"multiple or minimum of {name}", f"a count from 1 to {_MOST}", count)
    structure = scores.structure.at(geometry)
    unknown = sorted({*multiples, *minimums} - set(MULTIPLES))
    require(not unknown, "multiples", f"kinds among {sorted(MULTIPLES)}", unknown)
    kept: dict[str, Tensor] = {}
    for group in _scopes(structure, budget.scope):
        if budget.step_time is not None:
            kept |= _by_time(group, scores, budget, costs, multiples, minimums)
            continue
        pool = _pool(group, scores, budget.measure, length)
        if budget.units is not None:
            kept |= _by_counts(pool, budget.units)
        else:
            room = _room(structure, group, budget, length)
            _check_room(pool, room, budget, multiples, minimums, structure, length)
            share_out = _by_cost if allocation == "units" else _by_tensor
            kept |= share_out(pool, room * (1 + 1e-12), multiples, minimums)
    bits = {c.name: _unfold(c, scores.values[c.name], kept[c.name]) for c in structure.couplings}
    return _assemble(structure, bits, budget, method, length, scores)


def uniform(structure: Structure, counts: Mapping[str, int]) -> Plan:
    """The plan that keeps the first ``counts[coupling.name]`` units (default: all)."""
    values = {c.name: -torch.arange(float(c.units)) for c in structure.couplings}
    scores = Scores(structure=structure, values=values, criterion="position", statistic="none")
    bits = {
        c.name: torch.arange(c.units) < counts.get(c.name, c.units) for c in structure.couplings
    }
    return _assemble(structure, bits, None, "uniform", scores.sequence_length, scores)


def _scopes(structure: Structure, scope: str) -> list[tuple[Coupling, ...]]:
    if scope == "global":
        return [structure.couplings]
    layers = sorted({c.layer for c in structure.couplings})
    return [tuple(c for c in structure.couplings if c.layer == layer) for layer in layers]


def _pool(group: tuple[Coupling, ...], scores: Scores, measure: str, length: float) -> _Pool:
    names = tuple(sorted({_family(c) for c in group}))
    folded = [_fold(c, scores.values[c.name]) for c in group]
    counts = torch.tensor([len(values) for values in folded])
    by_params = measure == "params"
    costs = [c.heads * (float(c.params) if by_params else c.flops(length)) for c in group]
    segments = torch.arange(len(group), dtype=torch.int32)
    kinds = torch.tensor([names.index(_family(c)) for c in group], dtype=torch.int32)
    return _Pool(
        couplings=group,
        scores=torch.cat(folded),
        costs=torch.tensor(costs, dtype=torch.float64).repeat_interleave(counts),
        segments=segments.repeat_interleave(counts),
        kinds=kinds.repeat_interleave(counts),
        names=names,
    )


def _family(coupling: Coupling) -> str:
    return _FAMILY.get(coupling.kind, coupling.kind)


def _fold(coupling: Coupling, values: Tensor) -> Tensor:
    """Per-dimension attention units become slices: the r-th best dimension of every head."""
    values = values.detach().double().cpu()
    if coupling.heads == 1:
        return values
    ranked = values.view(coupling.heads, -1).sort(dim=1, descending=True, stable=True).values
    return ranked.sum(0)


def _unfold(coupling: Coupling, values: Tensor, kept: Tensor) -> Tensor:
    """The inverse of ``_fold``: as many best dimensions in every head as slices were kept."""
    if coupling.heads == 1:
        return kept
    ranked = values.detach().double().cpu().view(coupling.heads, -1)
    order = ranked.argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum())]
    bits = torch.zeros(ranked.shape, dtype=torch.bool)
    return bits.scatter_(1, order, True).flatten()


def _room(
    structure: Structure, group: tuple[Coupling, ...], budget: Budget, length: float
) -> float:
    """The budget left for the group's units once the fixed part is paid."""
    unit_total: float
    if budget.params is not None:
        beside = _beside(structure, budget)
        fixed = float(structure.fixed_params + beside)
        total = float(structure.params() + beside)
        share = budget.params
        unit_total = sum(c.params * c.units for c in group)
    else:
        assert budget.flops is not None
        fixed, total = structure.fixed_flops(length), structure.flops(length)
        share = budget.flops
        unit_total = sum(c.flops(length) * c.units for c in group)
    # A layer carries its share of what is fixed.
    part = unit_total / (total - fixed)
    return (share * total - fixed) * part


def _beside(structure: Structure, budget: Budget) -> int:
    """Parameters that a budget counts beside the structure's: the embeddings of a whole model."""
    return structure.embedding_params if budget.params_scope == "model" else 0


def _check_room(
    pool: _Pool,
    room: float,
    budget: Budget,
    multiples: Mapping[str, int],
    minimums: Mapping[str, int],
    structure: Structure,
    length: float,
) -> None:
    """Raise UsageError, naming the smallest budget, where what must stay has no room."""
    least = _least_cost(pool, minimums, multiples)
    if least > room * (1 + 1e-12):
        beside = _beside(structure, budget)
        fixed = structure.fixed_params + beside if budget.params else structure.fixed_flops(length)
        total = structure.params() + beside if budget.params else structure.flops(length)
        part = float(pool.costs.sum()) / (total - fixed)
        smallest = (least / part + fixed) / total
        raise UsageError(
            f"budget {budget.measure}: expected at least {smallest:.4f} (the smallest feasible "
            f"for this model), got {budget.requested}"
        )


def _by_cost(
    pool: _Pool, room: float, multiples: Mapping[str, int], minimums: Mapping[str, int]
) -> dict[str, Tensor]:
    selected = select_kept(
        pool.scores,
        costs=pool.costs,
        budget=room,
        segments=pool.segments,
        kinds=pool.kinds,
        minimum={i: minimums[name] for i, name in enumerate(pool.names)},
        multiple={i: multiples[name] for i, name in enumerate(pool.names)},
    )
    return _split(pool, selected.bits)


def _by_tensor(
    pool: _Pool, room: float, multiples: Mapping[str, int], minimums: Mapping[str, int]
) -> dict[str, Tensor]:
    mine = [pool.segments == segment for segment in range(len(pool.couplings))]
    scores = [pool.scores[where] for where in mine]
    costs = [float(pool.costs[where][0]) for where in mine]
    kinds = [_family(coupling) for coupling in pool.couplings]
    steps, least = ([limits[kind] for kind in kinds] for limits in (multiples, minimums))
    counts = tensor_counts(scores, costs, room, steps, least)
    return {
        coupling.name: select_kept(values, k=count).bits
        for coupling, values, count in zip(pool.couplings, scores, counts, strict=True)
    }


def _by_time(
    group: tuple[Coupling, ...],
    scores: Scores,
    budget: Budget,
    costs: StepCosts | None,
    multiples: Mapping[str, int],
    minimums: Mapping[str, int],
) -> dict[str, Tensor]:
    if costs is None:
        raise UsageError("costs: expected measured step costs for a step_time budget, got none")
    assert budget.step_time is not None
    ranked = {c.name: scores.values[c.name].detach().double().cpu() for c in group}
    best_first = [v.sort(descending=True).values.numpy() for v in ranked.values()]
    counts = fastest_widths(group, best_first, costs, budget.step_time, multiples, minimums)
    return {
        name: select_kept(values, k=count).bits
        for (name, values), count in zip(ranked.items(), counts, strict=True)
    }


def _least_cost(pool: _Pool, minimums: Mapping[str, int], multiples: Mapping[str, int]) -> float:
    total = 0.0
    for segment, coupling in enumerate(pool.couplings):
        costs = pool.costs[pool.segments == segment]
        step = multiples[_family(coupling)]
        count = min(len(costs), -(-minimums[_family(coupling)] // step) * step)
        total += float(costs[:count].sum())
    return total


def _by_counts(pool: _Pool, units: Mapping[str, int]) -> dict[str, Tensor]:
    bits = torch.zeros(len(pool.scores), dtype=torch.bool)
    unknown = sorted(set(units) - set(pool.names))
    require(not unknown, "budget units", f"kinds among {list(pool.names)}", unknown)
    for index, name in enumerate(pool.names):
        where = (pool.kinds == index).nonzero().flatten()
        count = units.get(name, len(where))
        require(count <= len(where), f"budget units[{name!r}]", f"at most {len(where)}", count)
        bits[where] = select_kept(pool.scores[where], k=count).bits
    return _split(pool, bits)


def _split(pool: _Pool, bits: Tensor) -> dict[str, Tensor]:
    return {c.name: bits[pool.segments == segment] for segment, c in enumerate(pool.couplings)}


def _assemble(
    structure: Structure,
    bits: Mapping[str, Tensor],
    budget: Budget | None,
    method: str,
    length: float,
    scores: Scores,
) -> Plan:
    masks: dict[str, Mask] = {}
    for coupling in structure.couplings:
        kept = bits[coupling.name]
        for member in coupling.members:
            band = Mask.rows if member.axis == 0 else Mask.columns
            lines = kept.repeat(member.repeats)
            masks[member.module] = band(lines, member.shape, **_size(member.axis, coupling))
    counts = {name: int(kept.sum()) for name, kept in bits.items()}
    return Plan(
        method=method,
        weight_masks=masks,
        couplings=structure.couplings,
        budget=budget,
        sequence_length=length,
        flops_dense=structure.flops(length),
        flops_planned=structure.flops(length, counts),
        params_dense=structure.params(),
        params_planned=structure.params(counts),
        origin={"criterion": scores.criterion, "statistic": scores.statistic, "rows": scores.rows},
        shapes=structure.shapes(),
    )


def _size(axis: int, coupling: Coupling) -> dict[str, int]:
    return {"height" if axis == 0 else "width": coupling.unit_size}
