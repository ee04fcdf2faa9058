"""Kernels for a GPU: a program holds a token in registers and gathers it again in backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.drops import Drop
from sensikernels.ops.common.triton_gelu import sum_partials
from sensikernels.ops.common.triton_launch import Config, on_its_device, processors, split
from sensikernels.ops.common.triton_norm import (
    draw_row,
    normalize,
    normalize_backward,
    programs,
    row_options,
    scale_of,
)
from sensikernels.ops.embed_norm import reference
from sensikernels.ops.embed_norm.reference import Lookup

SMALL = 8  # rows of a table whose gradient is summed in a fixed order
ADD_ROWS = Config(tile={"BLOCK_T": 32, "BLOCK_N": 64}, warps=4, stages=1)


@triton.jit
def _row(ids, table, rows, token, hidden, n, inside):
    """A token's row of a table, float32; NaN, and nothing read, where its id is of none."""
    row = tl.load(ids + token)
    there = (row >= 0) & (row < rows)
    other = tl.where(there, 0.0, float("nan"))
    return tl.load(table + row * hidden + n, mask=inside & there, other=other).to(tl.float32)


@triton.jit
def _gather(id0, id1, id2, table0, table1, table2, r0, r1, r2, token, hidden, n, inside):
    """The sum of a token's three rows, float32; zero outside."""
    z = _row(id0, table0, r0, token, hidden, n, inside)
    z += _row(id1, table1, r1, token, hidden, n, inside)
    z += _row(id2, table2, r2, token, hidden, n, inside)
    return tl.where(inside, z, 0.0)


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2"])
def embed_norm_kernel(
    id0,
    id1,
    id2,
    table0,
    table1,
    table2,
    weight,
    bias,
    seed,
    y,
    moments,
    rows0,
    rows1,
    rows2,
    hidden,
    threshold,
    scale,
    eps,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One token of y, and its mean and 1 / standard deviation."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < hidden
    z = _gather(
        id0, id1, id2, table0, table1, table2, rows0, rows1, rows2, token, hidden, n, inside
    )
    normal, mean, rstd = normalize(z, inside, hidden, eps)
    tl.store(moments + 2 * token, mean)
    tl.store(moments + 2 * token + 1, rstd)
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    out = normal * w + tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        draws = draw_row(tl.load(seed), token, hidden, BLOCK, ALIGNED)
        out = tl.where(draws < threshold, out * scale, 0.0)
    tl.store(y + token * hidden + n, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "tokens_each", "rows0", "rows1", "rows2"])
def embed_norm_backward_kernel(
    dy,
    id0,
    id1,
    id2,
    table0,
    table1,
    table2,
    moments,
    weight,
    seed,
    dsum,
    partial,
    tokens,
    tokens_each,
    rows0,
    rows1,
    rows2,
    hidden,
    threshold,
    scale,
    DROPS: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A chunk of tokens of dsum, and their sums for weight and bias."""
    chunk = tl.program_id(0)
    first = chunk.to(tl.int64) * tokens_each
    n = tl.arange(0, BLOCK)
    inside = n < hidden
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + tokens_each, tokens)):
        at = token * hidden + n
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            draws = draw_row(tl.load(seed), token, hidden, BLOCK, ALIGNED)
            grad = tl.where(draws < threshold, grad * scale, 0.0)
        z = _gather(
            id0, id1, id2, table0, table1, table2, rows0, rows1, rows2, token, hidden, n, inside
        )
        rstd = tl.load(moments + 2 * token + 1)
        normal = tl.where(inside, (z - tl.load(moments + 2 * token)) * rstd, 0.0)
        if AFFINE:
            dweight += grad * normal
            dbias += grad
        dz = normalize_backward(grad, normal, rstd, w, hidden)
        tl.store(dsum + at, dz.to(dsum.dtype.element_ty), mask=inside)
    if AFFINE:
        sums = partial + chunk.to(tl.int64) * 2 * hidden + n
        tl.store(sums, dweight, mask=inside)
        tl.store(sums + hidden, dbias, mask=inside)


@triton.jit(do_not_specialize=["tokens", "tokens_each"])
def add_rows_kernel(
    rows,
    index,
    partial,
    tokens,
    tokens_each,
    hidden,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``partial[chunk, r]`` = the rows of a chunk whose index is r, a strip of columns."""
    r = tl.program_id(1)
    chunk = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < hidden
    first = chunk.to(tl.int64) * tokens_each
    last = tl.minimum(first + tokens_each, tokens)
    total = tl.zeros([BLOCK_N], tl.float32)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mine = (t < last) & (tl.load(index + t, mask=t < last, other=-1) == r)
        at = rows + t[:, None] * hidden + n[None, :]
        value = tl.load(at, mask=mine[:, None] & inside[None, :], other=0.0)
        total += tl.sum(value.to(tl.float32), axis=0)
    to = partial + (chunk.to(tl.int64) * tl.num_programs(1) + r) * hidden
    tl.store(to + n, total, mask=inside)


@on_its_device
def forward(
    lookup: Lookup, weight: Tensor, bias: Tensor, drop: Drop, eps: float
) -> tuple[Tensor, Tensor]:
    """``(y, moments)``, for flat contiguous ids."""
    ids, tables = lookup
    tokens, hidden = ids[0].numel(), tables[0].shape[1]
    y = tables[0].new_empty((tokens, hidden))
    moments = y.new_empty((tokens, 2), dtype=torch.float32)
    if y.numel():
        seed = moments if drop.seed is None else drop.seed
        sizes = *(len(table) for table in tables), hidden, drop.threshold
        embed_norm_kernel[(tokens,)](
            *(*ids, *tables, weight, bias, seed, y, moments),
            *(*sizes, scale_of(drop.threshold), eps),
            DROPS=drop.seed is not None,
            **row_options(hidden),
        )
    return y, moments


@on_its_device
def backward(
    dy: Tensor, lookup: Lookup, moments: Tensor, weight: Tensor, drop: Drop, affine_needed: bool
) -> tuple[Tensor, Tensor]:
    """``(dsum, daffine)``; the chunks' float32 sums are added in a fixed order."""
    ids, tables = lookup
    tokens, hidden = dy.shape
    dsum = dy.new_empty(dy.shape)
    daffine = moments.new_empty((2, hidden) if affine_needed else 0)
    if not dy.numel():
        return dsum, daffine.zero_()
    chunks, each = split(tokens, 1, programs(dy))
    partial = moments.new_empty((chunks, 2, hidden) if affine_needed else 1)
    seed = moments if drop.seed is None else drop.seed
    sizes = tokens, each, *(len(table) for table in tables), hidden, drop.threshold
    embed_norm_backward_kernel[(chunks,)](
        *(dy, *ids, *tables, moments, weight, seed, dsum, partial),
        *(*sizes, scale_of(drop.threshold)),
        DROPS=drop.seed is not None,
        AFFINE=affine_needed,
        **row_options(hidden),
    )
    return dsum, sum_partials(partial, daffine) if affine_needed else daffine


@on_its_device
def add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """The sums of rows: up to ``SMALL`` of them in a fixed order, more by torch's atomics."""
    if count > SMALL or not rows.numel():
        return reference.add_rows(rows, index, count)
    tokens, hidden = rows.shape
    block_t, block_n = ADD_ROWS.tile.values()
    strips = triton.cdiv(hidden, block_n)
    chunks, each = split(tokens, block_t, triton.cdiv(4 * processors(rows), strips * count))
    partial = rows.new_empty((chunks, count, hidden), dtype=torch.float32)
    add_rows_kernel[(strips, count, chunks)](
        rows, index, partial, tokens, each, hidden, **ADD_ROWS.options
    )
    return sum_partials(partial, rows.new_empty((count, hidden)))
