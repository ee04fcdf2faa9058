"""Checks of the selecting operators' arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sensikernels._core.checks import expected, require
from sensikernels._core.values import readable, require_within
from sensikernels.ops.common.checks import check_count, check_kernels, check_tensor, described
from sensikernels.ops.common.lists import DTYPES

ALIGN = 64
"""Every tensor's bits start at a multiple of so many bytes."""
SCORES = 4
PER_SEGMENT, EQUAL, BUDGET = range(3)
"""Modes of ``select_units``."""


def check_elements(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
    size: int,
    k: Sequence[int],
    score: int,
    backend: str,
) -> None:
    """Pairs of tensors, their places in an arena of ``size`` bytes, and counts that are there."""
    require(len(tensors) > 0, "tensors", "at least one", 0)
    check_count(grads, "grads", len(tensors))
    check_count(offsets, "offsets", len(tensors))
    first, end = tensors[0], 0
    check_kernels(backend, first)
    for i, (t, g, at) in enumerate(zip(tensors, grads, offsets, strict=True)):
        for name, one in (("tensors", t), ("grads", g)):
            if one.dtype not in DTYPES or one.shape != t.shape or one.device != first.device:
                want = f"one of {DTYPES} {list(t.shape)} on {first.device}"
                raise expected(f"{name}[{i}]", want, described(one))
        require(
            at >= end and at % ALIGN == 0, f"offsets[{i}]", f"a multiple of {ALIGN} >= {end}", at
        )
        end = at + -(-t.numel() // 8)
    most = -(-end // ALIGN) * ALIGN
    require(end <= size <= most, "bytes", f"a number from {end} to {most}", size)
    sizes = [t.numel() for t in tensors]
    require(len(k) in (1, len(tensors)), "k", f"1 or {len(tensors)} counts", len(k))
    for i, (count, most) in enumerate(
        zip(k, sizes if len(k) == len(sizes) > 1 else [sum(sizes)], strict=True)
    ):
        require(0 <= count <= most, f"k[{i}]", f"an integer in [0, {most}]", count)
    require(0 <= score < SCORES, "score", f"a code below {SCORES}", score)


class Units(NamedTuple):
    """Arguments of ``select_units``, in the order of its schema."""

    scores: Tensor
    costs: Tensor | None
    segments: Tensor | None
    kinds: Tensor | None
    limits: Tensor
    mode: int
    minimum: Sequence[int]
    multiple: Sequence[int]
    prefix: bool
    n_segments: int


def check_units(call: Units) -> None:
    """Columns of one length and, where they can be read, ids that rise and kinds of 0 and 1."""
    scores, n_segments = call.scores, call.n_segments
    if scores.dim() != 1 or not scores.is_floating_point():
        raise expected("scores", "floating [n]", described(scores))
    shape, device = scores.shape, scores.device
    if call.costs is not None:
        check_tensor(call.costs, "costs", shape, None, device)
    for name, ids in (("segments", call.segments), ("kinds", call.kinds)):
        if ids is not None:
            integer = not ids.is_floating_point() and not ids.is_complex()
            require(integer, name, "an integer dtype", ids.dtype)
            check_tensor(ids, name, shape, ids.dtype, device)
    require(call.mode in (PER_SEGMENT, EQUAL, BUDGET), "mode", "0, 1 or 2", call.mode)
    for name, pair, least in (("minimum", call.minimum, 0), ("multiple", call.multiple, 1)):
        ok = len(pair) == 2 and all(least <= n < 1 << 31 for n in pair)
        require(ok, name, f"two integers from {least} on", list(pair))
    alone = 1 if call.segments is None and shape[0] else 0
    ok = alone <= n_segments < 1 << 31
    require(ok, "n_segments", f"a number of segments from {alone} on", n_segments)
    wanted = n_segments if call.mode == PER_SEGMENT else 1
    check_tensor(call.limits, "limits", (wanted,), torch.float64, device)
    _check_unit_values(call)


def _check_unit_values(call: Units) -> None:
    _, costs, segments, kinds, limits, *_ = call
    if segments is not None:
        require_within(segments, "segments", call.n_segments)
        rises = not readable(segments) or bool((segments[1:] >= segments[:-1]).all())
        require(rises, "segments", "ids that never fall", "others")
    if kinds is not None:
        require_within(kinds, "kinds", 2)
    if readable(limits):
        require(not limits.isnan().any(), "limits", "counts or a budget", "NaN")
        ok = costs is None or bool(((costs >= 0) & costs.isfinite()).all())
        require(ok, "costs", "finite costs >= 0", "others")


def check_order(cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, segments: int) -> None:
    """Columns of one length, and a number that is left; owners there are, if readable."""
    device = cost.device
    require(cost.dim() == 1, "cost", "float64 [n]", described(cost))
    check_tensor(cost, "cost", cost.shape, torch.float64, device)
    check_tensor(segment, "segment", cost.shape, torch.int64, device)
    check_tensor(free, "free", cost.shape, torch.bool, device)
    require(left.numel() == 1, "left", "one number", described(left))
    check_tensor(left, "left", left.shape, torch.float64, device)
    require(0 <= segments < 1 << 31, "segments", "a number of segments", segments)
    require_within(segment, "segment", segments)
    if readable(cost):
        require(bool((cost >= 0).all()), "cost", "costs >= 0", "others")
        require(not left.isnan().any(), "left", "a number", "NaN")
