"""``select_kept``: scores, unit costs and a budget to the kept units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sensikernels._checks import require, require_one_of
from sensikernels.ops.select_kept import reference
from sensikernels.types import Kept


def per_unit(value: int | Mapping[int, int], name: str, kinds: Tensor | None, n: int,
             device: torch.device, lowest: int) -> Tensor:  # fmt: skip
    """int64 ``[n]`` (or ``[1]``) of an int or a mapping from kind to int."""
    by_kind = value if isinstance(value, Mapping) else {0: value, 1: value}
    ok = all(isinstance(v, int) and v >= lowest for v in by_kind.values())
    require(ok, name, f"integers >= {lowest}", value)
    if not isinstance(value, Mapping):
        return torch.full((1,), value, dtype=torch.int64, device=device)
    require(kinds is not None, "kinds", f"a tensor, since {name} is given per kind", None)
    assert kinds is not None
    require(set(by_kind) >= {0, 1}, name, "an entry for kinds 0 and 1", sorted(by_kind))
    table = torch.tensor([by_kind[0], by_kind[1]], dtype=torch.int64)
    return table.to(device, non_blocking=True)[kinds.long()]


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
    if scores.is_cuda or scores.numel() == 0:
        return
    if costs is not None:
        ok = bool(((costs >= 0) & (costs.double() < torch.inf)).all())
        require(ok, "costs", "finite costs >= 0", costs.min().item())
    if segments is not None:
        ok = bool((segments.diff() >= 0).all() and segments[0] >= 0)
        require(ok, "segments", "non-decreasing ids >= 0", "ids that are not")
    if kinds is not None:
        ok = bool(((kinds == 0) | (kinds == 1)).all())
        require(ok, "kinds", "0 or 1", kinds.max().item())
        if segments is not None:
            same = (segments.diff() != 0) | (kinds.diff() == 0)
            require(bool(same.all()), "kinds", "one kind per segment", "a segment of both")


def count_segments(segments: Tensor | None, n_segments: int | None, k: object) -> int:
    """Segments there are; on a device they must be told."""
    if segments is None:
        return 1
    if n_segments is None and isinstance(k, Tensor) and k.dim() == 1:
        n_segments = k.numel()
    if n_segments is None:
        require(not segments.is_cuda, "n_segments", "a number, as segments are on a device", None)
        n_segments = int(segments[-1]) + 1 if segments.numel() else 0
    elif not segments.is_cuda and segments.numel():
        last = int(segments[-1])
        require(last < n_segments, "segments", f"ids below {n_segments}", last)
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
    minimum: int | Mapping[int, int] = 0,
    multiple: int | Mapping[int, int] = 1,
    scope: Literal["global", "per_segment"] = "global",
) -> Kept:
    """Keep the best units under a count ``k`` or under ``Σ costs <= budget``.

    Higher scores are better, ties go to the lowest index, NaN ranks below -inf. Inside each
    segment the units are ranked and cut into chunks of ``multiple``; the last chunk may be
    partial. Chunks are what is selected, so a segment keeps a prefix of its ranking and its count
    is a multiple unless all of it is kept. The first ``minimum`` units of every segment are always
    kept.

    - ``k``: exactly ``k`` units with ``multiple=1``; else at most ``k``, as if every cost were 1.
    - ``budget``: the budget is filled, best score per cost first; a chunk that does not fit is
      skipped (and ends its segment if ``multiple > 1``). With two ``kinds`` whose chunks have
      one cost each the selection is exact instead (Kwon et al., arXiv 2204.09656, ``search_mac``):
      for every number of kind-0 chunks the rest is filled with the best kind-1 chunks, and the
      highest sum wins. With no negative score that is the maximum.

    Nothing is read back from a device. There, values are not checked: an infeasible budget keeps
    the minimum, and a cost budget needs ``kinds`` with one cost each or equal costs.

    Args:
        scores: ``[n]``, any floating type; sums are float64.
        k: units to keep; for ``scope="per_segment"`` an int for each or integers ``[segments]``.
        costs: ``[n]``, finite, >= 0.
        budget: the highest sum of costs; for ``scope="per_segment"`` one for each or
            ``[segments]`` (CPU).
        segments: non-decreasing segment ids ``[n]``, one segment if absent.
        n_segments: number of segments, needed for segments on a device.
        kinds: 0 or 1 ``[n]``, one kind per segment.
        minimum: units of every segment that stay, or ``{kind: units}``.
        multiple: units per chunk, or ``{kind: units}``.
        scope: one budget for all units, or one for every segment.

    Returns:
        ``Kept`` of ``n`` units, on the device of the scores.

    Raises:
        UsageError: arguments that do not fit, or a budget below the cost of the minimum; the
            message names the smallest feasible budget.
    """
    require_one_of(scope, "scope", ("global", "per_segment"))
    check_units(scores, costs, segments, kinds)
    require((k is None) != (budget is None), "k", "either k or budget", "both or neither")
    require(budget is None or costs is not None, "costs", "a tensor, as budget is given", None)
    n, device = scores.numel(), scores.device
    count = count_segments(segments, n_segments, k)
    if n == 0:
        return reference.to_kept(scores.new_zeros(0, dtype=torch.bool), segments, count)
    ranking = reference.rank_units(reference.sort_keys(scores), segments, count)
    minimums = per_unit(minimum, "minimum", kinds, n, device, 0)
    multiples = per_unit(multiple, "multiple", kinds, n, device, 1)
    # A mapping gives one entry per unit; list them as the ranking does.
    minimums = minimums[ranking.units] if minimums.numel() == n > 1 else minimums
    multiples = multiples[ranking.units] if multiples.numel() == n > 1 else multiples
    if scope == "per_segment":
        if budget is not None:
            return _per_segment_budget(scores, budget, costs, segments, kinds, minimum, multiple)
        wanted = torch.as_tensor(k, dtype=torch.int64, device=device).expand(count)
        if not scores.is_cuda:
            sizes = torch.bincount(ranking.segment, minlength=count)
            ok = bool(((wanted >= 0) & (wanted <= sizes)).all())
            require(ok, "k", f"0 <= k <= units per segment {sizes.tolist()[:8]}", k)
        bits = reference.keep_per_segment(ranking, wanted, minimums, multiples)
        return reference.to_kept(bits, segments, count)
    if k is not None:
        known = not (isinstance(k, Tensor) and k.is_cuda)
        require(not known or 0 <= int(k) <= n, "k", f"0 <= k <= {n}", k)
        costs, budget = torch.ones_like(scores, dtype=torch.float64), k
        kinds = kinds if isinstance(multiple, Mapping) else None
    assert costs is not None
    chunks = reference.bundle(ranking, scores, costs, kinds, minimums, multiples)
    limit = torch.as_tensor(budget, dtype=torch.float64, device=device)
    # A count of single units, or on a device a count at all: every chunk costs the same.
    equal = k is not None and kinds is None and (multiple == 1 or scores.is_cuda)
    bits = reference.keep_within_budget(chunks, ranking, limit, prefix=multiple != 1, equal=equal)
    return reference.to_kept(bits, segments, count)


def _per_segment_budget(
    scores: Tensor,
    budget: float | Tensor,
    costs: Tensor | None,
    segments: Tensor | None,
    kinds: Tensor | None,
    minimum: int | Mapping[int, int],
    multiple: int | Mapping[int, int],
) -> Kept:
    """One budget per segment: each segment is a selection of its own."""
    require(not scores.is_cuda, "scope", "global for a budget on a device", "per_segment")
    assert costs is not None
    owner = torch.zeros(scores.numel(), dtype=torch.int64) if segments is None else segments.long()
    sizes = torch.bincount(owner).tolist()
    limits = torch.as_tensor(budget, dtype=torch.float64).expand(len(sizes)).tolist()
    parts = [t.split(sizes) for t in (scores, costs)]
    kind_parts = [None] * len(sizes) if kinds is None else kinds.split(sizes)
    bits = [
        select_kept(s, costs=c, budget=b, kinds=t, minimum=minimum, multiple=multiple).bits
        for s, c, t, b in zip(*parts, kind_parts, limits, strict=True)
    ]
    return reference.to_kept(torch.cat(bits), segments, len(sizes))
