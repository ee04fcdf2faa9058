"""The public function ``select_kept``: scores, unit costs and a budget to the kept units.

A segment keeps a prefix of its ranking, and its count is a multiple unless all of it is kept.
With ``k`` the selection is as if every cost were 1. With two kinds whose chunks have one cost each
a budget is filled exactly (Kwon et al., arXiv 2204.09656, ``search_mac``): for every number of
kind-0 chunks the rest is filled with the best kind-1 chunks, and the highest sum wins; with no
negative score that is the maximum. On a device both fills are made and one is taken there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.common.lists import native_refusal
from sensikernels.ops.select_kept import ops, reference
from sensikernels.ops.select_kept.checks import BUDGET, EQUAL, PER_SEGMENT, Units
from sensikernels.ops.select_kept.reference import reads_host
from sensikernels.types import Kept

Amount = int | Mapping[int, int]


def per_unit(value: Amount, name: str, kinds: Tensor | None, lowest: int) -> tuple[int, int]:
    """The amount for kinds 0 and 1, of an int or a mapping from kind to int."""
    if type(value) is int and value >= lowest:
        return value, value
    by_kind = value if isinstance(value, Mapping) else {0: value, 1: value}
    ok = all(isinstance(v, int) and v >= lowest for v in by_kind.values())
    require(ok, name, f"integers >= {lowest}", value)
    if isinstance(value, Mapping):
        require(kinds is not None, "kinds", f"a tensor, since {name} is given per kind", None)
        require(set(by_kind) >= {0, 1}, name, "an entry for kinds 0 and 1", sorted(by_kind))
    return by_kind[0], by_kind[1]


def check_units(
    scores: Tensor, costs: Tensor | None, segments: Tensor | None, kinds: Tensor | None
) -> None:
    """Shapes and types; on the CPU also the values."""
    require(scores.dim() == 1, "scores", "a 1-D tensor", f"{scores.dim()} dimensions")
    require(scores.is_floating_point(), "scores", "a floating dtype", scores.dtype)
    for name, t in (("costs", costs), ("segments", segments), ("kinds", kinds)):
        if t is None:
            continue
        require(t.shape == scores.shape, name, f"shape {tuple(scores.shape)}", tuple(t.shape))
        require(t.device == scores.device, name, f"device {scores.device}", t.device)
        if name != "costs":
            require(not t.is_floating_point(), name, "an integer dtype", t.dtype)
    if not reads_host(scores) or scores.numel() == 0:
        return
    if costs is not None:
        low, high = (float(x) for x in costs.aminmax())
        require(0 <= low <= high < torch.inf, "costs", "finite costs >= 0", low)
    if segments is not None:
        ok = bool((segments[1:] >= segments[:-1]).all() and segments[0] >= 0)
        require(ok, "segments", "non-decreasing ids >= 0", "ids that are not")
    if kinds is not None:
        low, high = (int(x) for x in kinds.aminmax())
        require(0 <= low <= high <= 1, "kinds", "0 or 1", high)
        if segments is not None:
            changes = kinds[1:] != kinds[:-1]
            mixed = bool((changes & (segments[1:] == segments[:-1])).any())
            require(not mixed, "kinds", "one kind per segment", "a segment of both")


def count_segments(segments: Tensor | None, n_segments: int | None, k: object) -> int:
    """Segments there are; on a device they must be told."""
    if segments is None:
        return 1
    if n_segments is None and isinstance(k, Tensor) and k.dim() == 1:
        n_segments = k.numel()
    if n_segments is None:
        require(reads_host(segments), "n_segments", "a number, as segments are on a device", None)
        n_segments = int(segments[-1]) + 1 if segments.numel() else 0
    elif reads_host(segments) and segments.numel():
        last = int(segments[-1])
        require(last < n_segments, "segments", f"ids below {n_segments}", last)
    require(0 <= n_segments < 1 << 31, "n_segments", "a number below 2**31", n_segments)
    return n_segments


@torch.no_grad()
def select_kept(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    costs: Tensor | None = None,
    budget: float | Tensor | None = None,
    segments: Tensor | None = None,
    n_segments: int | None = None,
    kinds: Tensor | None = None,
    minimum: Amount = 0,
    multiple: Amount = 1,
    scope: Literal["global", "per_segment"] = "global",
    backend: str = "auto",
) -> Kept:
    """Keep the best units under a count ``k`` or under ``Σ costs <= budget``.

    Higher scores are better, ties go to the lowest index, NaN ranks below -inf. Inside each
    segment the units are ranked and cut into chunks of ``multiple``, the last one partial. Chunks
    are what is selected, best score per cost first; one that does not fit is skipped, and ends
    its segment if ``multiple > 1``. The module's text says when the selection is the maximum.
    Nothing is read back from a device; values are not checked there, and an infeasible budget
    keeps the minimum.

    Args:
        scores: ``[n]``, any floating type; sums are float64.
        k: units to keep: exactly so many with ``multiple=1``, else at most. For
            ``scope="per_segment"`` an int for each or integers ``[segments]``.
        costs: ``[n]``, finite, >= 0.
        budget: the highest sum of costs; per segment one for each or ``[segments]``.
        segments: non-decreasing segment ids ``[n]``, one segment if absent.
        n_segments: number of segments, needed for segments on a device.
        kinds: 0 or 1 ``[n]``, one kind per segment.
        minimum: best units of every segment that stay, or ``{kind: units}``.
        multiple: units per chunk, or ``{kind: units}``.
        scope: one budget for all units, or one for every segment.
        backend: ``"auto"``, ``"native"`` (CPU) or ``"reference"``.

    Returns:
        ``Kept`` of ``n`` units, on the device of the scores.

    Raises:
        UsageError: arguments that do not fit, or a budget below the cost of the minimum; the
            message names the smallest feasible budget.
    """
    require_one_of(scope, "scope", ("global", "per_segment"))
    columns = Columns(scores, costs, segments, kinds)
    wanted = Wanted(k, budget, scope == "per_segment")
    return _select(columns, wanted, n_segments, (minimum, multiple), backend)


class Columns(NamedTuple):
    """A value per unit, or none."""

    scores: Tensor
    costs: Tensor | None
    segments: Tensor | None
    kinds: Tensor | None


class Wanted(NamedTuple):
    """A count or a budget, and whether each segment has one of its own."""

    k: int | Tensor | None
    budget: float | Tensor | None
    per_segment: bool


def _select(
    columns: Columns,
    wanted: Wanted,
    n_segments: int | None,
    amounts: tuple[Amount, Amount],
    backend: str,
) -> Kept:
    """``select_kept``; ``amounts``: minimum and multiple."""
    scores, costs, segments, kinds = columns
    check_units(*columns)
    counted = wanted.budget is None
    require((wanted.k is None) != counted, "k", "either k or budget", "both or neither")
    require(counted or costs is not None, "costs", "a tensor, as budget is given", None)
    n, count = scores.numel(), count_segments(segments, n_segments, wanted.k)
    # Chunks and minimums of more units than there are come to the same.
    low, high = per_unit(amounts[0], "minimum", kinds, 0)
    minimum, most = [min(low, n), min(high, n)], max(n, 1)
    low, high = per_unit(amounts[1], "multiple", kinds, 1)
    multiple = [min(low, most), min(high, most)]
    alone = kinds is not None and segments is None
    served = _decide(reads_host(scores), alone, backend).backend
    if n == 0:
        return reference.to_kept(scores.new_zeros(0, dtype=torch.bool), segments, count)
    if wanted.budget is not None and wanted.per_segment and reads_host(scores):
        return _per_segment_budget(columns, wanted.budget, count, amounts, backend)
    limits = _checked_limits(columns, wanted, count)
    if counted:  # as if every cost were 1
        by_kind = isinstance(amounts[0], Mapping) or isinstance(amounts[1], Mapping)
        columns = Columns(scores, None, segments, kinds if by_kind else None)
    prefix = multiple != [1, 1]
    mode = PER_SEGMENT if wanted.per_segment else EQUAL if counted and not prefix else BUDGET
    call = Units(*columns, limits, mode, minimum, multiple, prefix, count)
    return _native(call) if served == "native" else _reference(call, counted)


def _native(call: Units) -> Kept:
    if unwatched(call.scores):
        bits, indices, counts, least = ops.launch_units(call)
    else:
        bits, indices, counts, least = torch.ops.sensikernels.select_units(*call)
    if call.mode != PER_SEGMENT and float(least) > float(call.limits):
        raise reference.infeasible(float(least), float(call.limits))
    return Kept(bits=bits, indices=indices, counts=counts)


def _reference(call: Units, counted: bool) -> Kept:
    scores, costs, segments, kinds, limits, mode, *_ = call
    count, prefix = call.n_segments, call.prefix
    ranking = reference.rank_units(reference.sort_keys(scores), segments, count)
    lows, steps = (_listed(two, kinds, ranking) for two in (call.minimum, call.multiple))
    best = mode == EQUAL and segments is None and not any(call.minimum)
    if best or (mode == PER_SEGMENT and counted):
        bits = reference.keep_per_segment(ranking, limits.long(), lows, steps)
        return reference.to_kept(bits, segments, count)
    ones = torch.ones_like(scores, dtype=torch.float64) if costs is None else costs
    chunks = reference.bundle(ranking, scores, ones, kinds, lows, steps, single=not prefix)
    if mode == PER_SEGMENT:
        bits = reference.keep_within_budgets(chunks, ranking, limits, prefix=prefix)
    else:
        bits = reference.keep_within_budget(
            chunks,
            ranking,
            limits[0],
            prefix=prefix,
            equal=mode == EQUAL,
            segments=count,
            two_kinds=kinds is not None,
        )
    return reference.to_kept(bits, segments, count)


def explain_units(
    scores: Tensor,
    *,
    segments: Tensor | None = None,
    kinds: Tensor | None = None,
    backend: str = "auto",
) -> Choice:
    """The backend that :func:`select_kept` takes, and why."""
    return _decide(reads_host(scores), kinds is not None and segments is None, backend)


@cache
def _decide(host: bool, alone: bool, backend: str) -> Choice:
    """``alone``: kinds without segments."""
    if not host:
        refusal: str | None = "on a device it sorts with torch and fills with one kernel"
    else:
        refusal = "kinds without segments" if alone else native_refusal("select_units", "cpu")
    refusals = {"native": refusal, "reference": None}
    return choose(refusals, backend, reason="the fastest that serves cpu tensors")


def _limits(values: float | Tensor | None, count: int, device: torch.device) -> Tensor:
    """Counts or budgets as float64 ``[count]``, without waiting for a device."""
    if isinstance(values, Tensor):
        return values.to(device, torch.float64).reshape(-1).expand(count).contiguous()
    assert values is not None
    return torch.full((count,), float(values), dtype=torch.float64, device=device)


def _checked_limits(columns: Columns, wanted: Wanted, count: int) -> Tensor:
    k, budget, per_segment = wanted
    scores = columns.scores
    values = k if budget is None else budget
    limits = _limits(values, count if per_segment else 1, scores.device)
    if reads_host(limits):
        require(not limits.isnan().any(), "k" if budget is None else "budget", "a number", "NaN")
    if per_segment:
        _check_counts(scores, limits, columns.segments, count, k)
    elif budget is None and reads_host(limits):
        n = scores.numel()
        require(0 <= int(limits) <= n, "k", f"0 <= k <= {n}", k)
    return limits


def _check_counts(
    scores: Tensor, limits: Tensor, segments: Tensor | None, count: int, k: object
) -> None:
    if not reads_host(scores):
        return
    owner = torch.zeros(scores.numel(), dtype=torch.int64) if segments is None else segments.long()
    sizes = torch.bincount(owner, minlength=count)
    ok = bool(((limits >= 0) & (limits <= sizes)).all())
    require(ok, "k", f"0 <= k <= units per segment {sizes.tolist()[:8]}", k)


def _listed(two: Sequence[int], kinds: Tensor | None, ranking: reference.Ranking) -> Tensor:
    """int64, an amount per kind for every listed unit, or ``[1]``."""
    device = ranking.units.device
    first = torch.full((1,), two[0], dtype=torch.int64, device=device)
    if kinds is None or two[0] == two[1]:
        return first
    return torch.where(kinds[ranking.units] == 0, two[0], two[1])


def _per_segment_budget(
    columns: Columns,
    budget: float | Tensor,
    count: int,
    amounts: tuple[Amount, Amount],
    backend: str,
) -> Kept:
    """One budget per segment on the CPU: each segment is a selection of its own."""
    scores, costs, segments, kinds = columns
    assert costs is not None
    owner = torch.zeros(scores.numel(), dtype=torch.int64) if segments is None else segments.long()
    sizes = torch.bincount(owner, minlength=count).tolist()
    limits = torch.as_tensor(budget, dtype=torch.float64).expand(count).tolist()
    parts = [t.split(sizes) for t in (scores, costs, owner * 0)]
    kind_parts = [None] * len(sizes) if kinds is None else kinds.split(sizes)
    bits = [
        _select(Columns(s, c, o, kind), Wanted(None, limit, False), None, amounts, backend).bits
        for s, c, o, kind, limit in zip(*parts, kind_parts, limits, strict=True)
    ]
    return reference.to_kept(torch.cat(bits), segments, count)
