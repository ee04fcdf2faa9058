"""Triton twins of the compiled kernels; nothing is read back by the host.

``select_elements``: three passes count digits of the keys (11, 11 and 10 bits) of the entries that
share the digits found so far, one counts ties per tile, one writes the bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.triton_load import load_float

TILE = 4096
BINS = 2048
FILL = 1024
WARPS = 8
DIGITS = ((21, 11), (10, 11), (0, 10))
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIELDS = tl.constexpr(7)


@triton.jit
def _tile(table, tiles, SCORE: tl.constexpr, TILE: tl.constexpr):
    """Of this program's tile: its tensor's row, entries, whether they exist, and their keys."""
    pid = tl.program_id(0)
    row = table + tl.load(tiles + 2 * pid) * _FIELDS
    at = tl.load(tiles + 2 * pid + 1) + tl.arange(0, TILE)
    inside = at < tl.load(row + 4)
    x = tl.zeros([TILE], tl.float32)
    if SCORE != 3:
        x = load_float(tl.load(row), tl.load(row + 2), at, inside)
    if SCORE >= 2:
        g = load_float(tl.load(row + 1), tl.load(row + 3), at, inside)
        x = x * g if SCORE == 2 else g * g
    if SCORE == 1 or SCORE == 2:
        x = tl.abs(x)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
    key = tl.where(bits > 0x7FFFFFFF, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0, key)
    return row, at, inside, key


@triton.jit
def _count(
    table,
    tiles,
    keys,
    histogram,
    SCORE: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    row, _, inside, key = _tile(table, tiles, SCORE, TILE)
    selection = tl.load(row + 5)
    shared = key >> (SHIFT + WIDTH) == tl.load(keys + selection) >> (SHIFT + WIDTH)
    mine = inside & shared
    digit = tl.where(mine, (key >> SHIFT) & ((1 << WIDTH) - 1), 0).to(tl.int32)
    bins = tl.arange(0, BINS)
    others = TILE - tl.sum(mine.to(tl.int32), 0)
    counts = tl.histogram(digit, BINS) - tl.where(bins == 0, others, 0)
    tl.atomic_add(histogram + selection * BINS + bins, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _ties(table, tiles, keys, ties, SCORE: tl.constexpr, TILE: tl.constexpr):
    row, _, inside, key = _tile(table, tiles, SCORE, TILE)
    same = inside & (key == tl.load(keys + tl.load(row + 5)))
    tl.store(ties + tl.program_id(0), tl.sum(same.to(tl.int64), 0))


@triton.jit
def _bits(table, tiles, keys, wanted, needs, before, kept, SCORE: tl.constexpr, TILE: tl.constexpr):
    row, at, inside, key = _tile(table, tiles, SCORE, TILE)
    selection = tl.load(row + 5)
    last = tl.load(keys + selection)
    left = tl.load(needs + selection) - tl.load(before + tl.program_id(0))
    same = inside & (key == last)
    rank = tl.cumsum(same.to(tl.int32), 0)
    keep = (inside & (key > last)) | (same & (rank <= left))
    keep = keep & (tl.load(wanted + selection) > 0)
    tl.store(kept + tl.program_id(0), tl.sum(keep.to(tl.int64), 0))
    eight = tl.reshape(keep.to(tl.int32), [TILE // 8, 8])
    bytes_ = tl.sum(eight << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
    first = tl.min(at, 0)
    place = first // 8 + tl.arange(0, TILE // 8)
    out = tl.load(row + 6).to(tl.pointer_type(tl.uint8))
    tl.store(out + place, bytes_, mask=place * 8 < tl.load(row + 4))


@lru_cache(maxsize=32)
def _tables(
    rows: tuple[tuple[int, ...], ...], k: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """Descriptors, tiles, their tensors and first tiles, and counts: made once per address."""
    tiles = [(i, first) for i, row in enumerate(rows) for first in range(0, row[4], TILE)]
    owner = torch.tensor([tile[0] for tile in tiles], dtype=torch.int64)
    starts = torch.searchsorted(owner, owner) if len(k) > 1 else torch.zeros_like(owner)
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)
    on_host = (
        table,
        torch.tensor(tiles, dtype=torch.int64).reshape(-1, 2),
        owner,
        starts,
        torch.tensor(k, dtype=torch.int64),
    )
    return tuple(t.to(device) for t in on_host)


def select_elements(
    tensors: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    k: list[int],
    score: int,
    arena: Tensor,
    threshold: Tensor,
    counts: Tensor,
) -> None:
    """Exact counts, ties to the lowest entry; one count for all tensors or one each."""
    base = arena.zero_().data_ptr()
    rows = tuple(
        (
            t.data_ptr(),
            g.data_ptr(),
            CODES[t.dtype],
            CODES[g.dtype],
            t.numel(),
            i if len(k) > 1 else 0,
            base + start,
        )
        for i, (t, g, start) in enumerate(zip(tensors, grads, offsets, strict=True))
    )
    table, tiles, owner, starts, wanted = _tables(rows, tuple(k), arena.device)
    counts.zero_()
    threshold.fill_(torch.inf)
    grid = (len(tiles),)
    if not len(tiles):
        return
    keys, needs = torch.zeros_like(wanted), wanted
    for shift, width in DIGITS:
        histogram = torch.zeros(len(k), BINS, dtype=torch.int64, device=arena.device)
        _count[grid](
            table, tiles, keys, histogram, score, shift, width, TILE, BINS, num_warps=WARPS
        )
        at_least = histogram.flip(1).cumsum(1).flip(1)
        digit = ((at_least >= needs[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
        digit = digit.clamp(max=(1 << width) - 1)
        above = torch.nn.functional.pad(at_least, (0, 1)).gather(1, digit + 1)
        keys, needs = keys | digit[:, 0] << shift, needs - above[:, 0]
    ties, kept = torch.empty_like(owner), torch.empty_like(owner)
    _ties[grid](table, tiles, keys, ties, score, TILE, num_warps=WARPS)
    before = ties.cumsum(0) - ties
    before = before - before[starts]
    _bits[grid](table, tiles, keys, wanted, needs, before, kept, score, TILE, num_warps=WARPS)
    counts.index_add_(0, owner, kept)
    bits = torch.where(keys > 0x7FFFFFFF, keys & 0x7FFFFFFF, keys ^ 0xFFFFFFFF)
    lowest = bits.to(torch.int32).view(torch.float32)
    lowest = torch.where(keys == 0, torch.nan, lowest)
    threshold.copy_(torch.where(wanted > 0, lowest, torch.inf))


@triton.jit
def _fill(cost, segment, free, left, chosen, ended, n, PREFIX: tl.constexpr, FILL: tl.constexpr):
    room = tl.load(left)
    lane = tl.arange(0, FILL)
    for base in range(0, n, FILL):
        i = base + lane
        real = i < n
        price = tl.load(cost + i, mask=real, other=0.0)
        owner = tl.load(segment + i, mask=real, other=0)
        waits = tl.load(free + i, mask=real, other=0).to(tl.int32)
        taken = tl.zeros([FILL], tl.int32)
        more = tl.max(waits, 0)
        while more > 0:
            dear = waits * (price > room).to(tl.int32)
            waits = waits - dear
            if PREFIX:
                tl.atomic_min(ended + owner, i, mask=dear > 0)
                tl.debug_barrier()
                over = tl.load(ended + owner, mask=real, other=0, volatile=True) < i
                waits = tl.where(over, 0, waits)
                tl.debug_barrier()
            spent = tl.cumsum(tl.where(waits > 0, price, 0.0), 0)
            stop = tl.min(tl.where((waits > 0) & (spent > room), lane, FILL), 0)
            now = tl.where(lane < stop, waits, 0)
            taken += now
            waits -= now
            room -= tl.sum(tl.where(now > 0, price, 0.0), 0)
            more = tl.max(waits, 0)
        tl.store(chosen + i, taken.to(tl.uint8), mask=real)


def fill_in_order(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    """bool ``[n]``: what is taken when chunks are met in this order; one program."""
    chosen = torch.empty_like(free)
    ended = cost.new_full((segments + 1,), 2**31 - 1, dtype=torch.int32)
    # A chunk of a segment there is not, or of no known cost, is not taken.
    owner = segment.clamp(0, segments)
    free = free & (segment == owner) & (owner < segments) & (cost >= 0)
    _fill[(1,)](
        cost.contiguous(),
        owner.contiguous(),
        free.contiguous().view(torch.uint8),
        left,
        chosen.view(torch.uint8),
        ended,
        cost.numel(),
        prefix,
        FILL,
        num_warps=WARPS,
    )
    return chosen
