"""Checks of the operator ``group_reduce``'s tables; those of a ``GroupTable`` are sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.checks import expected, require, require_one_of
from sensikernels._core.values import readable, require_within
from sensikernels.ops.common.checks import KERNELS, check_count, check_tensor
from sensikernels.ops.group_reduce.table import (
    CHUNK_FIELDS,
    COLUMN_SUMS,
    DTYPE_CODE,
    GATHER,
    ROW_SUMS,
    STATISTICS,
    view_2d,
)


def check_tensors(weights: Sequence[Tensor], grads: Sequence[Tensor], device: torch.device) -> None:
    """Weights on the tables' device, each with a gradient of its shape if there are any."""
    if grads:
        check_count(grads, "grads", len(weights))
    for name, tensors in (("weights", weights), ("grads", grads)):
        for i, (t, weight) in enumerate(zip(tensors, weights, strict=False)):
            known = t.dtype in DTYPE_CODE
            check_tensor(t, f"{name}[{i}]", weight.shape, t.dtype if known else None, device)
            require(known, f"{name}[{i}]", "float32, bfloat16 or float16", t.dtype)


class Tables(NamedTuple):
    """The operator's tables, as in ``table.Grouping``."""

    chunks: Tensor
    starts: Tensor
    order: Tensor
    members: Tensor


def check_tables(
    weights: Sequence[Tensor],
    flat: Sequence[bool],
    tables: Tables,
    host: Tensor,
    descriptors: Tensor | None,
) -> None:
    """Dtypes, sizes and devices of the tables."""
    chunks, starts, order, members = tables
    n, device = len(weights), chunks.device
    check_count(flat, "flat", n)
    require(chunks.dim() == 2, "chunks", f"[chunks, {len(CHUNK_FIELDS)}]", list(chunks.shape))
    sized = (chunks.shape[0], len(CHUNK_FIELDS))
    check_tensor(chunks, "chunks", sized, torch.int64, device)
    require(starts.numel() > 0, "starts", "[groups + 1]", list(starts.shape))
    for name, t, dtype in (
        ("starts", starts, torch.int64),
        ("order", order, torch.int32),
        ("members", members, torch.int64),
    ):
        check_tensor(t, name, (t.numel(),), dtype, device)
    check_tensor(host, "host_descriptors", (n, 6), torch.int64, torch.device("cpu"))
    if descriptors is not None:
        check_tensor(descriptors, "descriptors", (n, 6), torch.int64, device)
    needed = device.type == "cuda"
    require(not needed or descriptors is not None, "descriptors", f"one on {device}", None)
    for name, t in tables._asdict().items():
        require(t.is_contiguous(), name, "a contiguous table", "a strided one")


def check_sums(
    tables: Tables,
    partials: Tensor,
    statistics: int,
    states: Sequence[Tensor | None],
    decay: float,
    backend: str,
) -> None:
    """Scratch and states of as many rows as there are statistics."""
    if not 0 < statistics < 1 << len(STATISTICS):
        raise expected("statistics", f"bits of {len(STATISTICS)} statistics", statistics)
    rows, device = bin(statistics).count("1"), tables.chunks.device
    require(partials.dim() == 2, "partials", f"[{rows}, partials]", list(partials.shape))
    buffers = {"partials": (partials, partials.shape[1])}
    for name, state in zip(("running", "ema"), states, strict=True):
        if state is not None:
            buffers[name] = state, tables.starts.numel() - 1
    for name, (t, width) in buffers.items():
        check_tensor(t, name, (rows, width), torch.float32, device)
        require(t.is_contiguous(), name, "a contiguous arena", "a strided one")
    require(0.0 <= decay <= 1.0, "decay", "a number in [0, 1]", decay)
    require_one_of(backend, "backend", KERNELS)


def check_values(
    weights: Sequence[Tensor], flat: Sequence[bool], tables: Tables, partials: int
) -> None:
    """No chunk reads beyond its tensor or writes beyond the partials, if that can be read."""
    chunks, starts, order, members = tables
    if not readable(chunks):
        return
    at = starts.cpu().numpy()
    last = order.numel() or partials
    rises = at[0] == 0 and bool((np.diff(at) >= 0).all()) and at[-1] <= last
    require(rises, "starts", f"offsets that rise from 0 to at most {last}", at[:8])
    require_within(order, "order", partials)
    table = chunks.cpu().numpy()
    kind, tensor, row0, rows, col0, cols, block, pitch, partial0 = table.T
    _require(np.isin(kind, (ROW_SUMS, COLUMN_SUMS, GATHER)), "a known kind", table)
    _require((tensor >= 0) & (tensor < len(weights)), f"one of {len(weights)} tensors", table)
    small = np.abs(table[:, 2:]).max(1, initial=0) < 1 << 31  # so that no product overflows
    _require(small & (table[:, 2:] >= 0).all(1) & (block > 0), "sizes from 0 on, a block", table)
    sums = np.where(kind == ROW_SUMS, rows, np.where(kind == COLUMN_SUMS, -(-cols // block), 1))
    _require(partial0 + sums <= partials, f"at most {partials} partial sums", table)
    shapes = np.array([view_2d(w.shape) for w in weights], np.int64).reshape(-1, 2)[tensor]
    size = shapes.prod(1)
    whole = np.array(flat, bool)[tensor]
    strided = (row0 + rows <= shapes[:, 0]) & (col0 + cols <= shapes[:, 1]) & (pitch == 0)
    reach = (row0 + rows - 1) * pitch + col0 + cols
    inside = np.where(whole, (pitch > 0) & (reach <= size), strided)
    gathers = kind == GATHER
    _require(inside | gathers | (rows * cols == 0), "entries of their tensor", table)
    _require((row0 + rows <= members.numel()) | ~gathers, "members there are", table)
    _require(whole | ~gathers, "a contiguous copy to gather from", table)
    named = members.cpu().numpy()
    for one, entries in zip(table[gathers], size[gathers], strict=True):
        mine = named[one[2] : one[2] + one[3]]
        ok = bool(((mine >= 0) & (mine < entries)).all())
        require(ok, "members", f"entries in [0, {entries})", mine[:8])


def _require(ok: np.ndarray, wanted: str, table: np.ndarray) -> None:
    if not ok.all():
        at = int(ok.argmin())
        named = dict(zip(CHUNK_FIELDS, map(int, table[at]), strict=True))
        raise expected("chunks", wanted, f"{named} at {at}")
