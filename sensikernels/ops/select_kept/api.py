"""``select_kept``: scores, unit costs and a budget to the kept units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import UsageError
from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.select_kept import native, ops, reference
from sensikernels.ops.select_kept.checks import BUDGET, EQUAL, PER_SEGMENT
from sensikernels.ops.select_kept.reference import reads_host
from sensikernels.types import Kept

Amount = int | Mapping[int, int]
UNIT_BACKENDS = ("auto", "native", "reference")


def per_unit(value: Amount, name: str, kinds: Tensor | None, lowest: int) -> tuple[int, int]:
    """The amount for kinds 0 and 1, of an int or a mapping from kind to int."""
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
    the minimum. Which of the two fills a budget gets is then decided on the device.

    Args:
        scores: ``[n]``, any floating type; sums are float64.
        k: units to keep; for ``scope="per_segment"`` an int for each or integers ``[segments]``.
        costs: ``[n]``, finite, >= 0.
        budget: the highest sum of costs; for ``scope="per_segment"`` one for each or
            ``[segments]``.
        segments: non-decreasing segment ids ``[n]``, one segment if absent.
        n_segments: number of segments, needed for segments on a device.
        kinds: 0 or 1 ``[n]``, one kind per segment.
        minimum: units of every segment that stay, or ``{kind: units}``.
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
    check_units(scores, costs, segments, kinds)
    require((k is None) != (budget is None), "k", "either k or budget", "both or neither")
    require(budget is None or costs is not None, "costs", "a tensor, as budget is given", None)
    n, device = scores.numel(), scores.device
    count = count_segments(segments, n_segments, k)
    minimums = per_unit(minimum, "minimum", kinds, 0)
    multiples = per_unit(multiple, "multiple", kinds, 1)
    # Chunks and minimums of more units than there are come to the same.
    minimums = min(minimums[0], n), min(minimums[1], n)
    multiples = min(multiples[0], max(n, 1)), min(multiples[1], max(n, 1))
    chosen, _ = choose_units_backend(scores, segments, kinds, backend)
    if n == 0:
        return reference.to_kept(scores.new_zeros(0, dtype=torch.bool), segments, count)
    if scope == "per_segment" and budget is not None and reads_host(scores):
        return _per_segment_budget(
            scores, budget, costs, segments, count, kinds, minimum, multiple, backend
        )
    wanted = k if budget is None else budget
    limits = _limits(wanted, count if scope == "per_segment" else 1, device)
    if reads_host(limits):
        require(not limits.isnan().any(), "budget" if k is None else "k", "a number", "NaN")
    if budget is None:
        # Counts: as if every cost were 1.
        costs = None
        kinds = kinds if isinstance(multiple, Mapping) or isinstance(minimum, Mapping) else None
    if scope == "per_segment":
        _check_counts(scores, limits, segments, count, k)
    elif budget is None and reads_host(limits):
        require(0 <= int(limits) <= n, "k", f"0 <= k <= {n}", k)
    prefix = multiples != (1, 1)
    equal = budget is None and not prefix
    if chosen == "native":
        mode = PER_SEGMENT if scope == "per_segment" else EQUAL if equal else BUDGET
        run = ops.launch_units if unwatched(scores) else torch.ops.sensikernels.select_units
        bits, indices, counts, least = run(
            scores,
            costs,
            segments,
            kinds,
            limits,
            mode,
            list(minimums),
            list(multiples),
            prefix,
            count,
        )
        if mode != PER_SEGMENT and float(least) > float(limits):
            raise reference.infeasible(float(least), float(limits))
        return Kept(bits=bits, indices=indices, counts=counts)
    ranking = reference.rank_units(reference.sort_keys(scores), segments, count)
    lows, steps = (_listed(two, kinds, ranking) for two in (minimums, multiples))
    best = equal and segments is None and minimums == (0, 0)
    if best or (scope == "per_segment" and budget is None):
        bits = reference.keep_per_segment(ranking, limits.long(), lows, steps)
        return reference.to_kept(bits, segments, count)
    ones = torch.ones_like(scores, dtype=torch.float64) if costs is None else costs
    chunks = reference.bundle(ranking, scores, ones, kinds, lows, steps, single=not prefix)
    if scope == "per_segment":
        bits = reference.keep_within_budgets(chunks, ranking, limits, prefix=prefix)
        return reference.to_kept(bits, segments, count)
    bits = reference.keep_within_budget(
        chunks,
        ranking,
        limits[0],
        prefix=prefix,
        equal=equal,
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
) -> str:
    """One line: which backend :func:`select_kept` takes, and why."""
    name, why = choose_units_backend(scores, segments, kinds, backend)
    return f"select_kept: {name} ({why})"


def choose_units_backend(
    scores: Tensor, segments: Tensor | None, kinds: Tensor | None, backend: str
) -> tuple[str, str]:
    """The backend that selects these units, and why."""
    require_one_of(backend, "backend", UNIT_BACKENDS)
    asked = environment.backend() if backend == "auto" else backend
    if asked == "reference":
        return asked, "asked for by name"
    if not reads_host(scores):
        refusal: str | None = "on a device it sorts with torch and fills with one kernel"
    elif kinds is not None and segments is None:
        refusal = "kinds without segments"
    else:
        refusal = native.refusal("cpu", "select_units")
    if backend == "native" and refusal:
        raise UsageError(f"backend: native cannot serve this call: {refusal}")
    return ("reference", refusal) if refusal else ("native", "it serves cpu tensors")


def _limits(values: float | Tensor | None, count: int, device: torch.device) -> Tensor:
    """Counts or budgets as float64 ``[count]``, without waiting for a device."""
    if isinstance(values, Tensor):
        return values.to(device, torch.float64).reshape(-1).expand(count).contiguous()
    assert values is not None
    return torch.full((count,), float(values), dtype=torch.float64, device=device)


def _check_counts(
    scores: Tensor, limits: Tensor, segments: Tensor | None, count: int, k: object
) -> None:
    if not reads_host(scores):
        return
    owner = torch.zeros(scores.numel(), dtype=torch.int64) if segments is None else segments.long()
    sizes = torch.bincount(owner, minlength=count)
    ok = bool(((limits >= 0) & (limits <= sizes)).all())
    require(ok, "k", f"0 <= k <= units per segment {sizes.tolist()[:8]}", k)


def _listed(two: tuple[int, int], kinds: Tensor | None, ranking: reference.Ranking) -> Tensor:
    """int64, an amount per kind for every listed unit, or ``[1]``."""
    device = ranking.units.device
    first = torch.full((1,), two[0], dtype=torch.int64, device=device)
    if kinds is None or two[0] == two[1]:
        return first
    return torch.where(kinds[ranking.units] == 0, two[0], two[1])


def _per_segment_budget(
    scores: Tensor,
    budget: float | Tensor,
    costs: Tensor | None,
    segments: Tensor | None,
    count: int,
    kinds: Tensor | None,
    minimum: Amount,
    multiple: Amount,
    backend: str,
) -> Kept:
    """One budget per segment on the CPU: each segment is a selection of its own."""
    assert costs is not None
    owner = torch.zeros(scores.numel(), dtype=torch.int64) if segments is None else segments.long()
    sizes = torch.bincount(owner, minlength=count).tolist()
    limits = torch.as_tensor(budget, dtype=torch.float64).expand(count).tolist()
    parts = [t.split(sizes) for t in (scores, costs, owner)]
    kind_parts = [None] * len(sizes) if kinds is None else kinds.split(sizes)
    bits = [
        select_kept(
            s,
            costs=c,
            budget=b,
            segments=o * 0,
            kinds=t,
            minimum=minimum,
            multiple=multiple,
            backend=backend,
        ).bits
        for s, c, o, t, b in zip(*parts, kind_parts, limits, strict=True)
    ]
    return reference.to_kept(torch.cat(bits), segments, count)
