"""Triton twin of the compiled kernels: the same work list, the same two launches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.triton_load import load_float
from sensikernels.ops.group_reduce.table import CHUNK_FIELDS, STATISTICS

BLOCK = 1024
GROUPS = 128
_FIELDS = tl.constexpr(len(CHUNK_FIELDS))


@triton.jit
def _add(MASK: tl.constexpr, w, g, a0, a1, a2, a3, a4, a5, a6, a7):
    p = w * g
    if MASK & 1:
        a0 += tl.abs(p)
    if MASK & 2:
        a1 += p
    if MASK & 4:
        a2 += p * p
    if MASK & 8:
        a3 += g * g
    if MASK & 16:
        a4 += tl.abs(g)
    if MASK & 32:
        a5 += w * w
    if MASK & 64:
        a6 += tl.abs(w)
    if MASK & 128:
        # On magnitudes the order of the bits is the order of the values, NaN above infinity.
        a7 = tl.maximum(a7, g.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _put(MASK: tl.constexpr, BIT: tl.constexpr, out, stride, inside, value):
    if MASK & BIT:
        tl.store(out, value, mask=inside)
        out += stride
    return out


@triton.jit
def _store(MASK: tl.constexpr, out, stride, inside, a0, a1, a2, a3, a4, a5, a6, a7):
    out = _put(MASK, 1, out, stride, inside, a0)
    out = _put(MASK, 2, out, stride, inside, a1)
    out = _put(MASK, 4, out, stride, inside, a2)
    out = _put(MASK, 8, out, stride, inside, a3)
    out = _put(MASK, 16, out, stride, inside, a4)
    out = _put(MASK, 32, out, stride, inside, a5)
    out = _put(MASK, 64, out, stride, inside, a6)
    _put(MASK, 128, out, stride, inside, a7.to(tl.float32, bitcast=True))


@triton.jit
def _store_sum(MASK: tl.constexpr, out, stride, a0, a1, a2, a3, a4, a5, a6, a7):
    _store(
        MASK,
        out,
        stride,
        True,
        tl.sum(a0),
        tl.sum(a1),
        tl.sum(a2),
        tl.sum(a3),
        tl.sum(a4),
        tl.sum(a5),
        tl.sum(a6),
        tl.max(a7),
    )


@triton.jit
def reduce_chunks(
    descriptors, chunks, members, partials, stride, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """One chunk: a partial sum per row, per column, per block of columns, or of a gather."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * _FIELDS
    kind, tensor, row0 = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    rows, col0, cols = tl.load(chunk + 3), tl.load(chunk + 4), tl.load(chunk + 5)
    block, pitch, partial = tl.load(chunk + 6), tl.load(chunk + 7), tl.load(chunk + 8)
    entry = descriptors + tensor * 6
    weight, grad = tl.load(entry), tl.load(entry + 1)
    w_pitch, g_pitch = tl.load(entry + 2), tl.load(entry + 3)
    w_type, g_type = tl.load(entry + 4), tl.load(entry + 5)
    if pitch != 0:
        w_pitch = pitch
        g_pitch = pitch
    out = partials + partial
    lane = tl.arange(0, BLOCK).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.float32)
    none = tl.zeros((BLOCK,), tl.int32)
    if kind == 0:
        for r in range(rows):
            w0 = (row0 + r) * w_pitch + col0
            g0 = (row0 + r) * g_pitch + col0
            a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, none
            for i in range(0, cols, BLOCK):
                inside = i + lane < cols
                w = load_float(weight, w_type, w0 + i + lane, inside)
                g = load_float(grad, g_type, g0 + i + lane, inside)
                a0, a1, a2, a3, a4, a5, a6, a7 = _add(MASK, w, g, a0, a1, a2, a3, a4, a5, a6, a7)
            _store_sum(MASK, out + r, stride, a0, a1, a2, a3, a4, a5, a6, a7)
    elif kind == 2:
        a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, none
        for i in range(0, rows, BLOCK):
            inside = i + lane < rows
            at = tl.load(members + row0 + i + lane, mask=inside, other=0)
            w = load_float(weight, w_type, at, inside)
            g = load_float(grad, g_type, at, inside)
            a0, a1, a2, a3, a4, a5, a6, a7 = _add(MASK, w, g, a0, a1, a2, a3, a4, a5, a6, a7)
        _store_sum(MASK, out, stride, a0, a1, a2, a3, a4, a5, a6, a7)
    elif block == 1:
        for i in range(0, cols, BLOCK):
            inside = i + lane < cols
            a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, none
            for r in range(rows):
                w = load_float(weight, w_type, (row0 + r) * w_pitch + col0 + i + lane, inside)
                g = load_float(grad, g_type, (row0 + r) * g_pitch + col0 + i + lane, inside)
                a0, a1, a2, a3, a4, a5, a6, a7 = _add(MASK, w, g, a0, a1, a2, a3, a4, a5, a6, a7)
            _store(MASK, out + i + lane, stride, inside, a0, a1, a2, a3, a4, a5, a6, a7)
    else:
        for b in range(tl.cdiv(cols, block)):
            first = b * block
            wide = tl.minimum(block, cols - first)
            a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, none
            for i in range(0, rows * wide, BLOCK):
                inside = i + lane < rows * wide
                r = row0 + (i + lane) // wide
                c = col0 + first + (i + lane) % wide
                w = load_float(weight, w_type, r * w_pitch + c, inside)
                g = load_float(grad, g_type, r * g_pitch + c, inside)
                a0, a1, a2, a3, a4, a5, a6, a7 = _add(MASK, w, g, a0, a1, a2, a3, a4, a5, a6, a7)
            _store_sum(MASK, out + b, stride, a0, a1, a2, a3, a4, a5, a6, a7)


@triton.jit
def finish_groups(
    starts,
    order,
    partials,
    out,
    running,
    ema,
    stride,
    groups,
    decay,
    LARGEST: tl.constexpr,
    ORDERED: tl.constexpr,
    RUNNING: tl.constexpr,
    EMA: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Groups from their partial sums, in order, in float64; ``LARGEST`` is the maximum's slot."""
    slot = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = j < groups
    start = tl.load(starts + j, mask=inside, other=0)
    count = tl.load(starts + j + 1, mask=inside, other=0) - start
    total = tl.zeros((GROUPS,), tl.float64)
    most = tl.zeros((GROUPS,), tl.int32)
    for i in range(tl.max(count)):
        there = i < count
        at = start + i
        if ORDERED:
            at = tl.load(order + at, mask=there, other=0).to(tl.int64)
        p = tl.load(partials + slot * stride + at, mask=there, other=0.0)
        total += p.to(tl.float64)
        most = tl.maximum(most, p.to(tl.int32, bitcast=True))
    sums = total.to(tl.float32)
    # Slots at or past LARGEST hold magnitudes, there is at most one.
    if slot == LARGEST:
        sums = most.to(tl.float32, bitcast=True)
    to = slot * groups + j
    tl.store(out + to, sums, mask=inside)
    if RUNNING:
        before = tl.load(running + to, mask=inside, other=0.0)
        after = before + sums
        if slot == LARGEST:
            more = tl.maximum(before.to(tl.int32, bitcast=True), most)
            after = more.to(tl.float32, bitcast=True)
        tl.store(running + to, after, mask=inside)
    if EMA:
        before = tl.load(ema + to, mask=inside, other=0.0)
        tl.store(ema + to, decay * before + (1.0 - decay) * sums, mask=inside)


def group_reduce(
    descriptors: Tensor,
    chunks: Tensor,
    starts: Tensor,
    order: Tensor,
    members: Tensor,
    statistics: int,
    partials: Tensor,
    out: Tensor,
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
) -> None:
    """Two launches, as the compiled kernels' launcher."""
    slots, groups = out.shape
    largest = slots - 1 if statistics >> STATISTICS.index("max_abs_grad") & 1 else -1
    if len(chunks):
        reduce_chunks[(len(chunks),)](
            descriptors,
            chunks,
            members,
            partials,
            partials.stride(0),
            MASK=statistics,
            BLOCK=BLOCK,
            num_warps=4,
        )
    if groups:
        finish_groups[(triton.cdiv(groups, GROUPS), slots)](
            starts,
            order,
            partials,
            out,
            out if running is None else running,
            out if ema is None else ema,
            partials.size(1),
            groups,
            decay,
            LARGEST=largest,
            ORDERED=order.numel() > 0,
            RUNNING=running is not None,
            EMA=ema is not None,
            GROUPS=GROUPS,
            num_warps=4,
        )
