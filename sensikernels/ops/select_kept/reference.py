"""The definition of a budgeted selection; on a device nothing is read back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.types import Kept


def sort_keys(scores: Tensor) -> Tensor:
    """int64 keys that order as the scores do: NaN lowest, then -inf, ..., -0 = +0, ..., +inf."""
    values = scores.double() + 0.0
    bits = values.view(torch.int64)
    keys = torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)
    return keys.masked_fill_(values.isnan(), torch.iinfo(torch.int64).min)


def descending(keys: Tensor) -> Tensor:
    """Positions from the highest key to the lowest, ties by position."""
    return torch.sort(keys, descending=True, stable=True).indices


def to_kept(bits: Tensor, segments: Tensor | None, n_segments: int) -> Kept:
    """Bits, ascending indices padded with ``n``, and counts per segment."""
    n = bits.numel()
    position = torch.where(bits, bits.cumsum(0) - 1, n)
    indices = torch.full((n + 1,), n, dtype=torch.int32, device=bits.device)
    indices.scatter_(0, position, torch.arange(n, dtype=torch.int32, device=bits.device))
    indices[n:].fill_(n)
    if segments is None:
        counts = bits.sum(dtype=torch.int32).view(1)
    else:
        counts = torch.zeros(n_segments, dtype=torch.int32, device=bits.device)
        counts.index_add_(0, segments.long(), bits.int())
    return Kept(bits=bits, indices=indices[:n], counts=counts)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Units listed segment after segment, each segment from its best unit to its worst."""

    units: Tensor
    segment: Tensor
    rank: Tensor
    size: Tensor
    """Units in the segment of the listed unit."""


def rank_units(keys: Tensor, segments: Tensor | None, n_segments: int) -> Ranking:
    """Rank the units of every segment; ``segments`` is non-decreasing."""
    units = descending(keys)
    if segments is None:
        segment = torch.zeros_like(units)
    else:
        by_segment = torch.sort(segments.long()[units], stable=True)
        units, segment = units[by_segment.indices], by_segment.values
    sizes = torch.zeros(n_segments, dtype=torch.int64, device=keys.device)
    sizes.index_add_(0, segment, torch.ones_like(segment))
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(keys.numel(), device=keys.device) - first[segment]
    return Ranking(units=units, segment=segment, rank=rank, size=sizes[segment])


def keep_per_segment(ranking: Ranking, k: Tensor, minimum: Tensor, multiple: Tensor) -> Tensor:
    """Bits of the best ``k[segment]`` of every segment, rounded down to chunks."""
    wanted = k[ranking.segment].clamp(min=0)
    wanted = torch.minimum(wanted, ranking.size)
    rounded = torch.where(wanted == ranking.size, wanted, wanted // multiple * multiple)
    forced = ranking.rank // multiple * multiple < minimum
    listed = forced | (ranking.rank < rounded)
    return torch.zeros_like(listed).scatter_(0, ranking.units, listed)


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Bundles of consecutively ranked units, padded to one per unit; padding has no units."""

    of_unit: Tensor
    """Chunk of each listed unit."""
    score: Tensor
    """Sum of the finite scores, float64."""
    infinite: Tensor
    """Number of +inf less the number of -inf and NaN."""
    cost: Tensor
    units: Tensor
    segment: Tensor
    kind: Tensor
    forced: Tensor


def bundle(
    ranking: Ranking,
    scores: Tensor,
    costs: Tensor,
    kinds: Tensor | None,
    minimum: Tensor,
    multiple: Tensor,
    *,
    single: bool = False,
) -> Chunks:
    """Cut every segment's ranking into chunks of ``multiple`` units, the last one partial.

    ``single``: a chunk is one unit, so that nothing need be summed.
    """
    n = scores.numel()
    values = scores.double()[ranking.units]
    finite = values.isfinite()
    of_unit = torch.arange(n, device=scores.device)
    lengths = torch.ones_like(of_unit)
    if not single:
        of_unit = (ranking.rank % multiple == 0).cumsum(0) - 1
        lengths = torch.zeros_like(lengths).scatter_add_(0, of_unit, lengths)

    def total(x: Tensor) -> Tensor:
        if single:
            return x.double()
        return torch.segment_reduce(x.double(), "sum", lengths=lengths, unsafe=True, initial=0.0)

    def first(x: Tensor) -> Tensor:
        if single:
            return x
        return torch.zeros(n, dtype=x.dtype, device=x.device).scatter_reduce_(
            0, of_unit, x, "amax", include_self=False
        )

    sign = torch.where(values == torch.inf, 1.0, -1.0).masked_fill_(finite, 0.0)
    kind = torch.zeros_like(ranking.segment) if kinds is None else kinds.long()[ranking.units]
    return Chunks(
        of_unit=of_unit,
        score=total(values.masked_fill(~finite, 0.0)),
        infinite=total(sign),
        cost=total(costs.double()[ranking.units]),
        units=lengths,
        segment=first(ranking.segment),
        kind=first(kind),
        forced=first((ranking.rank // multiple * multiple < minimum).long()).bool(),
    )


def best_first(chunks: Chunks, value: Tensor) -> Tensor:
    """Chunks by infinite part, then ``value``, then position."""
    order = descending(sort_keys(value))
    if reads_host(value) and not chunks.infinite.any():
        return order
    return order[torch.sort(chunks.infinite[order], descending=True, stable=True).indices]


def fill_two_kinds(chunks: Chunks, left: Tensor) -> Tensor:
    """The best pair of counts: for every number of kind-0 chunks, fill up with kind 1.

    Exact when every chunk of a kind has one cost; a tie goes to fewer chunks of kind 0.
    """
    n = chunks.score.numel()
    free = ~chunks.forced & (chunks.units > 0)
    order = best_first(chunks, chunks.score)
    sums: list[Tensor] = []
    infinite: list[Tensor] = []
    ranks, available, price = [], [], []
    for kind in (0, 1):
        mine = (free & (chunks.kind == kind))[order]
        ranks.append(torch.where(mine, mine.cumsum(0), n + 1))
        slot = torch.where(mine, mine.cumsum(0), n + 1)
        for source, into in ((chunks.score, sums), (chunks.infinite, infinite)):
            buffer = source.new_zeros(n + 2).scatter_(0, slot, source[order])
            buffer[n + 1 :].zero_()
            into.append(buffer[: n + 1].cumsum(0))
        available.append(mine.sum())
        price.append(
            torch.where(chunks.units > 0, chunks.cost, 0.0)
            .masked_fill(chunks.kind != kind, 0.0)
            .max()
        )
    n0 = torch.arange(n + 1, device=left.device)
    spent = n0 * price[0]
    feasible = (n0 <= available[0]) & (spent <= left)
    fits = torch.where(price[1] > 0, (left - spent) / price[1], torch.inf).floor()
    n1 = torch.minimum(fits.clamp(0, n), available[1].double()).long()
    n1 -= ((n1 > 0) & (spent + n1 * price[1] > left)).long()
    score = (sums[0] + sums[1][n1]).masked_fill(~feasible, -torch.inf)
    count = (infinite[0] + infinite[1][n1]).masked_fill(~feasible, -torch.inf)
    best = score.masked_fill(count < count.max(), -torch.inf).argmax().view(1)  # [0-d] would sync
    chosen = (ranks[0] <= best) | (ranks[1] <= n1[best])
    return torch.zeros_like(chosen).scatter_(0, order, chosen) & (left >= 0)


def fill_equal(chunks: Chunks, left: Tensor) -> Tensor:
    """The best chunks that fit if each cost as much as the dearest: exact for equal costs."""
    free = ~chunks.forced & (chunks.units > 0)
    order = best_first(chunks, chunks.score)
    price = chunks.cost.max()
    affordable = torch.where(price > 0, left / price, torch.inf).floor()
    mine = free[order]
    chosen = mine & (mine.cumsum(0) <= affordable)
    return torch.zeros_like(chosen).scatter_(0, order, chosen)


def greedy_order(chunks: Chunks, *, prefix: bool) -> Tensor:
    """Chunks by score per cost; with ``prefix`` by its running minimum inside the segment."""
    value = torch.where(chunks.cost > 0, chunks.score / chunks.cost, torch.inf)
    order = descending(sort_keys(value))
    if prefix:
        # Places instead of values: with the segment before them, a running maximum starts anew
        # in each segment (chunks are listed by segment; padding has nothing to lose).
        n = value.numel()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=order.device))
        base = torch.where(chunks.units > 0, chunks.segment, chunks.segment.max()) * n
        order = torch.sort((base + place).cummax(0).values - base, stable=True).indices
    return order[torch.sort(chunks.infinite[order], descending=True, stable=True).indices]


def fill_greedy(chunks: Chunks, left: Tensor, prefix: bool, segments: int) -> Tensor:
    """Best score per cost first; a chunk that does not fit is skipped.

    With ``prefix`` a skipped chunk also ends its segment, so that counts stay multiples.
    """
    order = greedy_order(chunks, prefix=prefix)
    free = ~chunks.forced & (chunks.units > 0)
    chosen: Tensor = torch.ops.sensikernels.fill_in_order(
        chunks.cost[order], chunks.segment[order], free[order], left, prefix, segments
    )
    return torch.zeros_like(chosen).scatter_(0, order, chosen)


def fill_in_order(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    """The op ``fill_in_order`` on the CPU: bool ``[n]``, what is taken when met in this order."""
    costs, owner = cost.numpy(), segment.numpy()
    room, order = float(left), np.flatnonzero(free.numpy())
    chosen = np.zeros(len(costs), bool)
    while order.size:
        spent = np.cumsum(costs[order])
        fit = int(np.searchsorted(spent, room, side="right"))
        chosen[order[:fit]] = True
        room -= float(spent[fit - 1]) if fit else 0.0
        order = order[fit:]
        too_dear = costs[order] > room
        if prefix and order.size:
            first_skip = np.full(segments, order.size)
            np.minimum.at(first_skip, owner[order[too_dear]], np.flatnonzero(too_dear))
            too_dear |= np.arange(order.size) > first_skip[owner[order]]
        order = order[~too_dear]
    return torch.from_numpy(chosen)


def one_cost_per_kind(chunks: Chunks) -> Tensor:
    """bool []: whether there are two kinds and each kind's chunks cost the same."""
    verdicts = []
    for kind in (0, 1):
        mine = (chunks.units > 0) & (chunks.kind == kind)
        low = chunks.cost.masked_fill(~mine, torch.inf).min()
        verdicts.append(mine.any() & (low == chunks.cost.masked_fill(~mine, -torch.inf).max()))
    return verdicts[0] & verdicts[1]


def keep_within_budget(
    chunks: Chunks,
    ranking: Ranking,
    budget: Tensor,
    *,
    prefix: bool,
    equal: bool,
    segments: int,
    two_kinds: bool,
) -> Tensor:
    """Bits of the units kept; ``equal``: all chunks cost the same. A CPU budget is checked."""
    forced_cost = chunks.cost.masked_fill(~chunks.forced, 0.0).sum()
    left = budget - forced_cost
    host = reads_host(left)
    if host and left < 0:
        raise infeasible(float(forced_cost), float(budget))
    if equal:
        extra = fill_equal(chunks, left)
    elif not two_kinds:
        extra = fill_greedy(chunks, left, prefix, segments)
    elif host:
        exact = bool(one_cost_per_kind(chunks))
        extra = (
            fill_two_kinds(chunks, left) if exact else fill_greedy(chunks, left, prefix, segments)
        )
    else:
        # Nothing is read back, so both are made and the device takes one.
        exact_fill = fill_two_kinds(chunks, left)
        greedy = fill_greedy(chunks, left, prefix, segments)
        extra = torch.where(one_cost_per_kind(chunks), exact_fill, greedy)
    listed = (chunks.forced | extra)[chunks.of_unit]
    return torch.zeros_like(listed).scatter_(0, ranking.units, listed)


def keep_within_budgets(
    chunks: Chunks, ranking: Ranking, budgets: Tensor, *, prefix: bool
) -> Tensor:
    """Bits of the units kept under one budget per segment; nothing is checked or read back.

    A segment has one kind, so the fill is the greedy one: a launch per segment.
    """
    segments, real = budgets.numel(), chunks.units > 0
    sizes = torch.zeros(segments, dtype=torch.int64, device=budgets.device)
    sizes.index_add_(0, chunks.segment, real.long())
    spent = torch.segment_reduce(  # in a fixed order, unlike a floating index_add_
        chunks.cost.masked_fill(~chunks.forced, 0.0), "sum", lengths=sizes, unsafe=True, initial=0.0
    )
    left, order = budgets - spent, greedy_order(chunks, prefix=prefix)
    cost, owner, free = (t[order] for t in (chunks.cost, chunks.segment, real & ~chunks.forced))
    chosen = torch.zeros_like(free)
    for s in range(segments):
        chosen |= torch.ops.sensikernels.fill_in_order(
            cost, owner, free & (owner == s), left[s], prefix, segments
        )
    extra = torch.zeros_like(chosen).scatter_(0, order, chosen)
    listed = (chunks.forced | extra)[chunks.of_unit]
    return torch.zeros_like(listed).scatter_(0, ranking.units, listed)


def reads_host(t: Tensor) -> bool:
    """Whether the values of ``t`` can be looked at without waiting for a device."""
    return t.device.type == "cpu"


def infeasible(least: float, budget: float) -> UsageError:
    """The error for a budget below the cost of the minimum."""
    return UsageError(
        f"budget: expected at least {least:.17g}, the cost of the minimum, got {budget:.17g}"
    )
