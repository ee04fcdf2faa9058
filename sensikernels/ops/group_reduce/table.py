"""The layout of a reduction: built once per model, kept on the device, reused every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.checks import expected, require

STATISTICS: Final = (
    "sum_abs_wg",
    "sum_wg",
    "sum_wg_squared",
    "sum_batch_grad_squared",
    "sum_abs_grad",
    "sum_weight_squared",
    "sum_abs_weight",
    "max_abs_grad",
)
"""Their order is the bit order of the kernels' ``statistics`` argument."""

NEEDS_GRAD: Final = frozenset(STATISTICS) - {"sum_weight_squared", "sum_abs_weight"}

Group = Any
"""``"tensor"``, ``"row"``, ``"column"``, ``("head", dim[, axis])``, ``("block", bm, bn)`` or
``("ids", int32 ids, number of groups)``."""

ROW_SUMS, COLUMN_SUMS, GATHER = range(3)
CHUNK: Final = 1 << 16
STRIP_ROWS: Final = 128
STRIP_COLS: Final = 2048
DTYPE_CODE: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK_FIELDS: Final = (
    "kind",
    "tensor",
    "row0",
    "rows",
    "col0",
    "cols",
    "block",
    "pitch",
    "partial0",
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """The place of one tensor's groups in a statistic's row of the arena."""

    name: str
    offset: int
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Chunks (the first launch's work list) and, per group, the partial sums that make it up.

    A chunk is nine integers, see ``CHUNK_FIELDS``. ``ROW_SUMS``: one partial per row of the
    rectangle; ``COLUMN_SUMS``: one per ``block`` columns, over all its rows; ``GATHER``: one
    partial of the elements ``members[row0 : row0 + rows]``. Rows are ``pitch`` elements apart, or
    the tensor's own row stride if that is 0. Group ``j`` is the sum, in order, of partials
    ``order[starts[j] : starts[j + 1]]``; an empty ``order`` is the identity.
    """

    chunks: np.ndarray
    starts: np.ndarray
    order: np.ndarray
    members: np.ndarray
    partials: int
    groups: int
    spans: tuple[Span, ...]
    flat: tuple[bool, ...]


def view_2d(shape: Sequence[int]) -> tuple[int, int]:
    """``[out, in]`` of a weight of any rank: a bias is a column, a scalar ``[1, 1]``."""
    rows = shape[0] if shape else 1
    return rows, int(np.prod(shape[1:], dtype=np.int64))


def block_of(group: Group, shape: Sequence[int], where: str) -> tuple[int, int, tuple[int, ...]]:
    """Block height, block width and shape of the result of a rectangular ``group``."""
    rows, cols = view_2d(shape)
    whole_rows, whole_cols = max(rows, 1), max(cols, 1)
    kind, *sizes = (group,) if isinstance(group, str) else tuple(group)
    if kind == "tensor" and not sizes:
        return whole_rows, whole_cols, ()
    if kind == "row" and not sizes:
        return 1, whole_cols, (rows,)
    if kind == "column" and not sizes:
        return whole_rows, 1, (cols,)
    integers = all(isinstance(s, int) and not isinstance(s, bool) for s in sizes)
    if kind == "head" and integers and len(sizes) in (1, 2):
        dim, axis = (*sizes, 0)[:2]
        require(axis in (0, 1), where, "a head axis of 0 (rows) or 1 (columns)", axis)
        size = (rows, cols)[axis]
        ok = dim > 0 and size % dim == 0
        require(ok, where, f"a head_dim that divides axis {axis} of {tuple(shape)}", dim)
        return (dim, whole_cols, (size // dim,)) if axis == 0 else (whole_rows, dim, (size // dim,))
    if kind == "block" and integers and len(sizes) == 2:
        bm, bn = sizes
        require(bm > 0 and bn > 0, where, "positive block sizes", (bm, bn))
        return bm, bn, (-(-rows // bm), -(-cols // bn))
    forms = "'tensor', 'row', 'column', ('head', dim[, axis]), ('block', bm, bn) or "
    raise expected(where, forms + "('ids', ids, count)", repr(group))


class _Work:
    """The chunks of one tensor, and which group owns each partial they make."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.chunks: list[np.ndarray] = []
        self.owners: list[np.ndarray] = []
        self.partials = 0

    def emit(self, owner: np.ndarray, kind: int, *columns: Any) -> None:
        """Chunks of ``kind``; the last column is the first partial, from 0 within this call."""
        table = np.stack(np.broadcast_arrays(kind, self.index, *columns), -1).astype(np.int64)
        table = table.reshape(-1, len(CHUNK_FIELDS))
        table[:, -1] += self.partials
        self.chunks.append(table)
        self.owners.append(owner)
        self.partials += len(owner)

    def segments(self, row0: int, owner: np.ndarray, length: int, pitch: int) -> None:
        """``len(owner)`` rows of ``length`` elements, each summed by itself."""
        rows = len(owner)
        if length <= CHUNK:
            step = max(CHUNK // max(length, 1), 1)
            first = np.arange(0, rows, step)
            height = np.minimum(step, rows - first)
            self.emit(owner, ROW_SUMS, row0 + first, height, 0, length, length, pitch, first)
            return
        pieces = -(-length // CHUNK)
        row = np.repeat(np.arange(rows), pieces)
        col = np.tile(np.arange(pieces) * CHUNK, rows)
        width = np.minimum(CHUNK, length - col)
        partial = np.arange(rows * pieces)
        self.emit(owner[row], ROW_SUMS, row0 + row, 1, col, width, width, pitch, partial)

    def columns(self, rows: int, cols: int, bm: int, bn: int, pitch: int) -> None:
        """Blocks narrower than the tensor: sums down the columns of strips."""
        wide = -(-cols // bn)
        top = np.arange(0, rows, bm)
        cuts = [np.arange(t, min(t + bm, rows), STRIP_ROWS) for t in top] if bm > STRIP_ROWS else []
        row = np.concatenate(cuts) if cuts else top
        height = np.minimum(np.minimum(STRIP_ROWS, rows - row), bm - row % bm)
        per_strip = max((STRIP_COLS if rows > 1 else CHUNK) // bn, 1)
        block = np.arange(0, wide, per_strip)
        blocks = np.minimum(per_strip, wide - block)
        row, block = (a.ravel() for a in np.meshgrid(row, block, indexing="ij"))
        height = np.repeat(height, len(blocks))
        blocks = np.tile(blocks, len(row) // max(len(blocks), 1))
        width = np.minimum(cols, (block + blocks) * bn) - block * bn
        partial = np.cumsum(blocks) - blocks
        inside = np.arange(blocks.sum()) - np.repeat(partial, blocks)
        owner = np.repeat(row // bm * wide + block, blocks) + inside
        self.emit(owner, COLUMN_SUMS, row, height, block * bn, width, bn, pitch, partial)

    def rectangles(self, rows: int, cols: int, bm: int, bn: int, flat: bool) -> None:
        """Groups that are ``bm`` by ``bn`` blocks of ``[rows, cols]``."""
        if rows * cols == 0:
            return
        if flat and bn >= cols and bm * cols > 1:
            # Whole rows of contiguous storage: a group is one run of elements.
            length = min(bm, rows) * cols
            full, rest = divmod(rows * cols, length)
            self.segments(0, np.arange(full), length, length)
            if rest:
                self.segments(full, np.array([full]), rest, length)
        elif flat and bm == 1 and bn >= 32 and cols % bn == 0:
            self.segments(0, np.arange(rows * cols // bn), bn, bn)
        elif flat and bm == 1 and (bn == 1 or cols == 1):
            self.columns(1, rows * cols, 1, 1, rows * cols)
        elif bn >= cols:
            self.segments(0, np.arange(rows) // bm, cols, 0)
        else:
            self.columns(rows, cols, bm, bn, cols if flat else 0)

    def gather(self, ids: np.ndarray, groups: int, member0: int) -> np.ndarray:
        """Groups given per element; returns the elements, group by group."""
        kept = np.flatnonzero(ids >= 0)
        members = kept[np.argsort(ids[kept], kind="stable")]
        counts = np.bincount(ids[kept], minlength=groups)
        first = np.cumsum(counts) - counts
        pieces = -(-counts // CHUNK)
        owner = np.repeat(np.arange(groups), pieces)
        piece = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        size = np.minimum(CHUNK, counts[owner] - piece * CHUNK)
        begin = member0 + first[owner] + piece * CHUNK
        self.emit(owner, GATHER, begin, size, 0, 1, 1, 1, np.arange(len(owner)))
        return members


def group_ids(group: Group, shape: Sequence[int], where: str) -> tuple[np.ndarray, int]:
    """Checked ids (one per row, or one per element) and the number of groups."""
    form = "('ids', int32 ids, number of groups)"
    require(len(group) == 3, where, form, f"{len(group)} entries")
    _, ids, count = group
    ok = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64)
    require(ok, where, form, ids.dtype if isinstance(ids, Tensor) else type(ids).__name__)
    rows, _ = view_2d(shape)
    fits = tuple(ids.shape) in ((rows,), tuple(shape))
    require(fits, where, f"ids of shape {(rows,)} or {tuple(shape)}", tuple(ids.shape))
    require(isinstance(count, int) and count >= 0, where, "a number of groups >= 0", count)
    flat = ids.detach().cpu().numpy().reshape(-1).astype(np.int64)
    inside = flat.size == 0 or bool(flat.max() < count and flat.min() >= -1)
    require(
        inside,
        where,
        f"ids in [-1, {count})",
        f"[{flat.min()}, {flat.max()}]" if flat.size else "none",
    )
    return flat, count


def plan_tensor(
    index: int, group: Group, shape: Sequence[int], flat: bool, member0: int
) -> tuple[_Work, tuple[int, ...], np.ndarray]:
    """Work, result shape and gathered members of one tensor."""
    where = f"groups[{index}]"
    rows, cols = view_2d(shape)
    work, members = _Work(index), np.zeros(0, np.int64)
    if isinstance(group, tuple) and group[:1] == ("ids",):
        ids, count = group_ids(group, shape, where)
        if cols == 0:
            return work, (count,), members  # groups of nothing, whatever ids their rows have
        if ids.size == rows and cols > 1:
            kept = np.flatnonzero(ids >= 0)
            for start in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
                if len(start):
                    work.segments(int(start[0]), ids[start], cols, cols if flat else 0)
        else:
            members = work.gather(ids, count, member0)
        return work, (count,), members
    bm, bn, result = block_of(group, shape, where)
    work.rectangles(rows, cols, bm, bn, flat)
    return work, result, members


def make_layout(
    shapes: Sequence[Sequence[int]],
    flat: Sequence[bool],
    groups: Sequence[Group],
    names: Sequence[str],
) -> Grouping:
    """The layout of tensors of these shapes; ``flat[i]``: tensor ``i`` is contiguous."""
    chunks, order, counts, members, spans, flats = [], [], [], [], [], []
    partials = offset = n_members = 0
    for i, (shape, group) in enumerate(zip(shapes, groups, strict=True)):
        work, result, taken = plan_tensor(i, group, shape, flat[i], n_members)
        span = Span(name=names[i], offset=offset, shape=result, weight_shape=tuple(shape))
        owner = np.concatenate([*work.owners, np.zeros(0, np.int64)])
        for table in work.chunks:
            table[:, -1] += partials
        chunks += work.chunks
        counts.append(np.bincount(owner, minlength=span.count))
        order.append(partials + np.argsort(owner, kind="stable"))
        members.append(taken)
        flats.append(flat[i] or len(taken) > 0)
        spans.append(span)
        partials += work.partials
        offset += span.count
        n_members += len(taken)
    require(partials < 2**31, "groups", "fewer than 2**31 partial sums", partials)
    empty = np.zeros(0, np.int64)
    ordered = np.concatenate([empty, *order])
    identity = bool((ordered == np.arange(partials)).all())
    return Grouping(
        chunks=np.concatenate([np.zeros((0, len(CHUNK_FIELDS)), np.int64), *chunks]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([empty, *counts]))]).astype(np.int64),
        order=(empty if identity else ordered).astype(np.int32),
        members=np.concatenate([empty, *members]),
        partials=partials,
        groups=offset,
        spans=tuple(spans),
        flat=tuple(flats),
    )


_cached_layout = lru_cache(maxsize=16)(make_layout)


def is_flat(weight: Tensor, grad: Tensor) -> bool:
    """Whether rows need no stride of their own: contiguous, or to be copied so."""
    strided = [t for t in (weight, grad) if not t.is_contiguous()]
    return not strided or any(t.dim() != 2 or t.stride(1) != 1 for t in strided)


class GroupTable:
    """Descriptor table of a list of tensors: build it once, pass it to every ``group_reduce``.

    Holds the work list and the group map on the tensors' device, one descriptor per tensor
    (addresses, row strides, dtypes) that is rewritten only when an address changed, and the buffer
    of partial sums. With static addresses nothing is allocated or copied but the result, so a
    captured CUDA graph replays it. One table serves one stream at a time.

    Raises:
        UsageError: a group that does not fit its tensor, or tensors on several devices.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
        *,
        groups: Group | Sequence[Group] = "tensor",
        names: Sequence[str] | None = None,
    ) -> None:
        n = len(weights)
        per_tensor = list(groups) if isinstance(groups, list) else [groups] * n
        require(len(per_tensor) == n, "groups", f"one group per tensor, {n}", len(per_tensor))
        self.groups: list[Group] = per_tensor
        names = [str(i) for i in range(n)] if names is None else list(names)
        require(len(names) == n, "names", f"one name per tensor, {n}", len(names))
        require(len(set(names)) == n, "names", "distinct names", "a repeated name")
        devices = sorted({str(t.device) for t in (*weights, *(grads or ()))})
        require(len(devices) <= 1, "weights", "tensors on one device", ", ".join(devices))
        self.device = weights[0].device if n else torch.device("cpu")
        flat = tuple(map(is_flat, weights, grads or weights))
        key = (tuple(tuple(w.shape) for w in weights), flat, tuple(per_tensor), tuple(names))
        self.shapes = [w.shape for w in weights]
        plain = all(not isinstance(g, tuple) or g[:1] != ("ids",) for g in per_tensor)
        self.layout = _cached_layout(*key) if plain else make_layout(*key)
        for name in ("chunks", "starts", "order", "members"):
            setattr(self, name, torch.from_numpy(getattr(self.layout, name)).to(self.device))
        self.host_descriptors = torch.zeros(n, 6, dtype=torch.int64)
        self.descriptors: Tensor | None = None
        if self.device.type == "cuda":
            self.host_descriptors = self.host_descriptors.pin_memory()
            self.descriptors = self.host_descriptors.to(self.device)
        self._partials: dict[int, Tensor] = {}
        self.binding: Any = None  # what ``repeat`` remembers of the last call

    chunks: Tensor
    starts: Tensor
    order: Tensor
    members: Tensor

    def __len__(self) -> int:
        return len(self.layout.spans)

    def partials(self, statistics: int) -> Tensor:
        """float32 scratch ``[statistics, partials]``, kept so that its address is stable."""
        if statistics not in self._partials:
            self._partials[statistics] = torch.empty(
                statistics, self.layout.partials, device=self.device
            )
        return self._partials[statistics]
