"""The public function ``group_reduce``, its result, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import expected, require, require_one_of
from sensikernels.ops.common.checks import described
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.lists import choice
from sensikernels.ops.group_reduce import ops, reference, repeat
from sensikernels.ops.group_reduce.table import (
    NEEDS_GRAD,
    STATISTICS,
    Group,
    GroupTable,
    Span,
)


@dataclass(frozen=True, kw_only=True)
class GroupSums:
    """Every statistic of every group in one ``[statistics, groups]`` arena, and views of it."""

    arena: Tensor
    statistics: tuple[str, ...]
    spans: tuple[Span, ...]

    def flat(self, statistic: str) -> Tensor:
        """``[all groups]``: one statistic, tensor after tensor."""
        require_one_of(statistic, "statistic", self.statistics)
        return self.arena[self.statistics.index(statistic)]

    def view(self, statistic: str, tensor: int | str) -> Tensor:
        """One statistic of one tensor, by position or name, in the shape of its groups."""
        if isinstance(tensor, str):
            names = [span.name for span in self.spans]
            require_one_of(tensor, "tensor", names)
            tensor = names.index(tensor)
        span = self.spans[tensor]
        return self.flat(statistic)[span.offset : span.offset + span.count].view(span.shape)

    def views(self, statistic: str) -> dict[str, Tensor]:
        """One statistic of every tensor, by name."""
        return {span.name: self.view(statistic, i) for i, span in enumerate(self.spans)}


def zeros(table: GroupTable, statistics: Sequence[str]) -> GroupSums:
    """Sums to start ``running`` or ``ema`` from."""
    names = ordered_statistics(statistics)
    arena = torch.zeros(len(names), table.layout.groups, device=table.device)
    return GroupSums(arena=arena, statistics=names, spans=table.layout.spans)


def ordered_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """The names asked for, checked, in the order of ``STATISTICS``."""
    require(not isinstance(statistics, str), "statistics", "a sequence of names", statistics)
    require(len(statistics) > 0, "statistics", "at least one name", "none")
    for name in statistics:
        require_one_of(name, "statistics", STATISTICS)
    return tuple(name for name in STATISTICS if name in statistics)


def explain(
    weights: Sequence[Tensor], grads: Sequence[Tensor] | None = None, backend: str = "auto"
) -> Choice:
    """The backend that ``group_reduce`` takes for these tensors, and why."""
    return choice("group_reduce", [*weights, *(grads or ())], backend)


def check_tensors(
    weights: Sequence[Tensor], grads: Sequence[Tensor] | None, statistics: Sequence[str]
) -> None:
    """Weights and gradients pair up, on one device, in floating-point types."""
    if grads is None:
        missing = [name for name in statistics if name in NEEDS_GRAD]
        needed = f"gradients, which {', '.join(missing)} needs"
        require(not missing, "grads", needed, None)
        grads = weights
    require(len(grads) == len(weights), "grads", f"{len(weights)} tensors", len(grads))
    kinds = {(t.device, t.dtype) for t in (*weights, *grads) if isinstance(t, Tensor)}
    dtypes, devices = {dtype for _, dtype in kinds}, {device for device, _ in kinds}
    # One comparison for all; the tensor at fault is looked for only if there is one.
    shapes = [[t.shape if isinstance(t, Tensor) else None for t in ts] for ts in (weights, grads)]
    if shapes[0] != shapes[1] or len(devices) > 1:
        device = weights[0].device
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            got = tuple(g.shape) if isinstance(g, Tensor) else g
            fits = isinstance(g, Tensor) and w.shape == g.shape
            require(fits, f"grads[{i}]", f"a tensor of shape {tuple(w.shape)}", got)
            same = w.device == g.device == device
            require(same, f"weights[{i}]", f"device {device}", f"{w.device}, {g.device}")
    for dtype in dtypes:
        require(dtype.is_floating_point, "weights", "floating dtypes", dtype)


def check_states(
    running: GroupSums | None,
    ema: tuple[GroupSums, float] | None,
    table: GroupTable,
    statistics: tuple[str, ...],
) -> ops.States:
    """The arenas of ``running`` and ``ema``, which must hold these statistics of these groups."""
    average, decay = (None, 0.0) if ema is None else (ema[0], float(ema[1]))
    require(0.0 <= decay <= 1.0, "ema", "a decay in [0, 1]", decay)
    sums = None if running is None else _arena("running", running, table, statistics)
    means = None if average is None else _arena("ema", average, table, statistics)
    return ops.States(sums, means, decay)


def _arena(name: str, state: GroupSums, table: GroupTable, statistics: tuple[str, ...]) -> Tensor:
    require(isinstance(state, GroupSums), name, "GroupSums", type(state).__name__)
    require(state.statistics == statistics, name, f"statistics {statistics}", state.statistics)
    require(state.spans == table.layout.spans, name, "the groups of this call", "other groups")
    require(state.arena.is_contiguous(), name, "a contiguous arena", state.arena.stride())
    arena, shape = state.arena, (len(statistics), table.layout.groups)
    if arena.shape != shape or arena.device != table.device or not arena.is_floating_point():
        raise expected(name, f"floating {list(shape)} on {table.device}", described(arena))
    return arena


@torch.no_grad()
def group_reduce(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    statistics: Sequence[str] = ("sum_abs_wg",),
    *,
    groups: Group | list[Group] = "tensor",
    names: Sequence[str] | None = None,
    running: GroupSums | None = None,
    ema: tuple[GroupSums, float] | None = None,
    table: GroupTable | None = None,
    backend: str = "auto",
) -> GroupSums:
    """Sum statistics of ``(weight, gradient)`` over groups of entries, for all tensors at once.

    Hold a ``table`` where the same tensors are summed again: making one takes longer than a sum.

    Args:
        weights: tensors of any shape, float32, bfloat16 or float16 mixed (float64: reference).
            A tensor is viewed as ``[shape[0], rest]``; a bias as ``[n, 1]``.
        grads: one per weight, same shape, of any of these types; ``None`` if no statistic asks.
        statistics: any of ``STATISTICS``. With ``w``, ``g`` the entries of a group:
            ``sum_abs_wg`` Σ|w·g|, ``sum_wg`` Σ w·g, ``sum_wg_squared`` Σ (w·g)²,
            ``sum_batch_grad_squared`` Σ g² (of this batch; per sample:
            :func:`per_sample_grad_squared`), ``sum_abs_grad`` Σ|g|, ``sum_weight_squared`` Σ w²,
            ``sum_abs_weight`` Σ|w|, ``max_abs_grad`` max|g|.
        groups: one for all tensors, or a list with one per tensor. ``"tensor"``, ``"row"``,
            ``"column"``, ``("head", head_dim[, axis])``, ``("block", bm, bn)`` (partial blocks at
            the edges), or ``("ids", ids, count)`` with int32 ids per row or per entry; an entry
            of id -1 is in no group.
        names: names of the tensors, for the views of the result.
        running: sums updated in place by ``running += sums`` (``max`` for ``max_abs_grad``).
        ema: ``(state, decay)``, updated in place: ``state = decay·state + (1-decay)·sums``.
        table: a :class:`GroupTable` of these tensors, which then fixes groups and names.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.

    Returns:
        ``GroupSums``, float32 (float64 if a tensor is). Accumulated in a fixed order: the bits do
        not depend on the number of threads. A NaN makes its group NaN; an empty group is 0.

    Raises:
        UsageError: tensors that do not pair up, unknown statistics, groups that do not fit, or a
            named backend that cannot serve the call.
    """
    statistics = ordered_statistics(statistics)
    held, asked = table is not None, (backend, environment.backend())
    bound = None if table is None else _bound(table, weights, grads, statistics, asked)
    if bound is None:
        check_tensors(weights, grads, statistics)
    if table is None:
        table = GroupTable(weights, grads, groups=groups, names=names)
    states = check_states(running, ema, table, statistics)
    if bound is None:
        arena = _first(table, weights, grads, statistics, states, asked, held)
    else:
        arena = ops.launch_bound(bound, table, statistics, states)
    return GroupSums(arena=arena, statistics=statistics, spans=table.layout.spans)


def _bound(
    table: GroupTable,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    statistics: tuple[str, ...],
    asked: tuple[str, str],
) -> Tensor | None:
    """Descriptors of these tensors, if ``table`` has just served them."""
    pairs = weights if grads is None and NEEDS_GRAD.isdisjoint(statistics) else grads
    return None if pairs is None else repeat.again(table, weights, pairs, asked)


def _first(
    table: GroupTable,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    statistics: tuple[str, ...],
    states: ops.States,
    asked: tuple[str, str],
    held: bool,
) -> Tensor:
    """The sums of tensors that ``table`` has not just served; noted if the caller holds it."""
    same = [w.shape for w in weights] == table.shapes
    require(same, "table", "a table of these tensors", "other shapes")
    backend = explain(weights, grads, asked[0]).backend
    if backend == "reference":
        arena = reference.group_reduce(weights, grads, statistics, table.groups)
        reference.update_states(arena, statistics, *states)
        return arena
    arena = ops.launch(backend, table, weights, grads, statistics, states)
    if held and backend == "native":
        repeat.remember(table, weights, weights if grads is None else grads, asked)
    return arena
