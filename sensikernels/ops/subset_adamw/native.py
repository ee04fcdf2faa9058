"""Descriptor tables for the compiled kernels, which see pointers and sizes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.bits import pack_bits
from sensikernels.ops.common.lists import native_refusal
from sensikernels.ops.subset_adamw.item import Item, Scaling
from sensikernels.ops.subset_adamw.kept import SPAN, matrix_shape

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KIND = {"all": 0, "rows": 1, "columns": 2, "blocks": 3, "elements": 4}
MASKED, TOUCHED = 5, 6
FIELDS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "master",
    "step",
    "index",
    "offsets",
    "cohort",
    "cohort_start",
    "sum_abs",
    "sum_squared",
    "clock",
    "row_clock",
    "kind",
    "param_dtype",
    "grad_dtype",
    "rows",
    "columns",
    "units",
    "cohorts",
    "block_rows",
    "block_columns",
    "group",
)
"""Columns of the int64 table, in the order of ``enum Field`` in csrc."""
CHUNK = {"cpu": 32768, "cuda": 4096}
"""Entries a thread, on a GPU a warp, takes at a time."""


def why_not(device: torch.device, dtypes: set[torch.dtype]) -> str | None:
    """The reason for which the compiled kernels cannot run a step; None if they can."""
    other = sorted(str(dtype) for dtype in dtypes - DTYPES.keys())
    if other:
        return f"parameters of {', '.join(other)}"
    return native_refusal("subset_adamw_step", device.type)


def reads_host(device: torch.device) -> bool:
    """Whether the kernels read tables in host memory."""
    return device.type == "cpu"


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy of ``table`` on the device, without waiting for it."""
    if torch.cuda.is_current_stream_capturing():
        # A replay would copy from host memory that has another owner by then.
        raise RuntimeError("the optimizer's table is not laid out yet: run one step before")
    return table.pin_memory().to(device, non_blocking=True)


class StepTable:
    """The table of an item list, rebuilt only for another list."""

    def __init__(self) -> None:
        self._items: Sequence[Item] | None = None
        self._table = np.zeros((0, len(FIELDS)), dtype=np.int64)
        self._chunks = torch.zeros((0, 3), dtype=torch.int64)
        self._dtypes = 0  # bit 3 p + g where an item has param_dtype p and grad_dtype g
        self._held: list[Tensor] = []
        self._partials = torch.zeros(0, dtype=torch.float64)
        self._on_device: tuple[Tensor, Tensor] | None = None

    def update(self, items: Sequence[Item], hyper: Tensor, scaling: Scaling) -> Tensor:
        """See ``reference.update``."""
        norm = torch.empty((), dtype=torch.float32, device=hyper.device)
        grads = [_served(item) for item in items]
        by_rows = [place for place, item in enumerate(items) if item.entries is not None]
        named: dict[int, Tensor] = {}
        host, run = reads_host(hyper.device), extension.ops()
        for place in by_rows if host else ():
            named[place], grads[place] = run.subset_adamw_coalesce(
                items[place].entries, grads[place]
            )
        table, chunks = self._refresh(items, grads, named, hyper.device)
        for place in () if host else by_rows:
            rows, order = _entries(items[place]).sort(stable=True)
            # It writes their addresses into the table: in a captured step they are the graph's.
            named[place], grads[place] = run.subset_adamw_coalesce_sorted(
                rows, order, grads[place], table, place
            )
        run.subset_adamw_step(
            table,
            chunks,
            hyper,
            self._partials,
            norm,
            self._dtypes,
            scaling.max_grad_norm or 0.0,
            *(None if number is None else number.float() for number in scaling[1:]),
        )
        return norm

    def _refresh(
        self,
        items: Sequence[Item],
        grads: Sequence[Tensor],
        named: Mapping[int, Tensor],
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Table and chunks of this step; copied to a device only when something has moved."""
        host = reads_host(device)
        stale = items is not self._items
        if stale:
            self._held = []
            rows = [self._row(item, host=host) for item in items]
            self._table = np.array(rows, dtype=np.int64).reshape(len(rows), len(FIELDS))
            place = FIELDS.index("param_dtype")
            pairs = 3 * self._table[:, place] + self._table[:, place + 1]
            self._dtypes = int(np.bitwise_or.reduce(1 << pairs))
            self._items = items
        pointers = np.array(
            [
                (item.param.data_ptr(), grad.data_ptr() if host or item.entries is None else 0)
                for item, grad in zip(items, grads, strict=True)
            ],
            dtype=np.int64,
        ).reshape(len(grads), 2)
        moved = stale or not np.array_equal(self._table[:, :2], pointers)
        self._table[:, :2] = pointers
        resized = stale
        units, index = FIELDS.index("units"), FIELDS.index("index")
        for place, item in enumerate(items):
            if item.entries is None:
                continue
            resized |= int(self._table[place, units]) != item.entries.numel()
            self._table[place, units] = item.entries.numel()
            if place in named:
                self._table[place, index] = named[place].data_ptr()
        if resized:
            self._chunks = torch.from_numpy(_chunks(self._table, CHUNK[device.type]))
            self._partials = torch.empty(len(self._chunks), dtype=torch.float64, device=device)
        if host:
            return torch.from_numpy(self._table), self._chunks
        if moved or resized or self._on_device is None:
            self._on_device = (
                to_device(torch.from_numpy(self._table.copy()), device),
                to_device(self._chunks, device),
            )
        return self._on_device

    def _row(self, item: Item, *, host: bool) -> list[int]:
        layout = item.layout
        index, offsets = layout.index, layout.offsets
        if item.masked and layout.kind != "elements":
            index, offsets = pack_bits(layout.flags().flatten()).to(item.param.device), None
        self._held += [t for t in (index, offsets) if t is not None]
        kind = MASKED if item.masked else KIND[layout.kind]
        kind = kind if item.entries is None else TOUCHED
        rows, columns = matrix_shape(layout.shape)
        clock, cohort, starts = item.clock, item.cohort, item.cohort_start
        cohorts = 0
        if cohort is not None and starts is not None and cohort.numel():
            # On a device all of them: a later change of when entries joined is written in place.
            cohorts = starts.numel() if not host else _in_use(starts)
        pointers = (
            item.param,
            item.grad,
            item.exp_avg,
            item.exp_avg_sq,
            item.master,
            item.step,
            index,
            offsets,
            cohort if cohorts else None,
            starts,
            *item.sums,
            None if clock is None else clock.now,
            None if clock is None else clock.rows,
        )
        lines = layout.kind in ("rows", "columns", "blocks") and not item.masked
        return [
            *(0 if t is None else t.data_ptr() for t in pointers),
            kind,
            DTYPES[item.param.dtype],
            DTYPES[_served(item).dtype if item.entries is None else torch.float32],
            rows,
            columns,
            # A device also passes over the room for more, which a later change may fill.
            0 if not lines else layout.units if host else layout.room,
            cohorts,
            *layout.block_shape,
            item.group,
        ]


def _in_use(starts: Tensor) -> int:
    """Cohorts up to the last that began after the first step; 0 if none did."""
    late = starts.nonzero()
    return int(late.max()) + 1 if late.numel() else 0


def _entries(item: Item) -> Tensor:
    assert item.entries is not None
    return item.entries


def _served(item: Item) -> Tensor:
    """The gradient, contiguous, in float32 or the parameter's dtype."""
    grad = item.grad
    if grad.dtype not in (torch.float32, item.param.dtype):
        grad = grad.float()
    return grad if grad.is_contiguous() else grad.contiguous()


def _chunks(table: np.ndarray, size: int) -> np.ndarray:
    """Work units as int64 [chunks, 3] = item, first unit, end; see ``Chunk`` in csrc.

    Where rows are summed no row is cut in two, so that each sum has one writer.
    """
    column = {name: table[:, place] for place, name in enumerate(FIELDS)}
    rows, wide, kind = column["rows"], column["columns"], column["kind"]
    sums = ((column["sum_abs"] | column["sum_squared"]) != 0) & (wide > 1)
    high, block = column["block_rows"], column["block_rows"] * column["block_columns"]
    is_all, blocks = kind == KIND["all"], kind == KIND["blocks"]
    bits = (kind == KIND["elements"]) | (kind == MASKED)
    choices = [
        (is_all & ~sums, rows * wide, 1),
        (bits & ~sums, -(-rows * wide // SPAN), SPAN),
        (blocks & sums, rows // np.maximum(high, 1), high * wide),
        (blocks, column["units"], block),
        (kind == KIND["columns"], rows, column["units"]),
        (is_all | bits, rows, wide),
    ]
    where = [choice[0] for choice in choices]
    units = np.select(where, [choice[1] for choice in choices], column["units"])
    entries = np.select(where, [choice[2] for choice in choices], wide)
    per_chunk = np.maximum(1, size // np.maximum(entries, 1))
    counts = np.where(entries > 0, -(-units // per_chunk), 0)
    item = np.repeat(np.arange(len(table)), counts)
    within = np.arange(len(item)) - np.repeat(counts.cumsum() - counts, counts)
    first = within * per_chunk[item]
    end = np.minimum(first + per_chunk[item], units[item])
    return np.stack((item, first, end), axis=1)
