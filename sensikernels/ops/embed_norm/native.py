"""Launchers of the compiled kernels: the reference's functions, of contiguous tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher
from sensikernels.ops.common.drops import Drop
from sensikernels.ops.common.rowwise import single
from sensikernels.ops.embed_norm.reference import Lookup


def forward(
    lookup: Lookup, weight: Tensor, bias: Tensor, drop: Drop, eps: float
) -> tuple[Tensor, Tensor]:
    ids, tables = lookup
    y = tables[0].new_empty((ids[0].numel(), tables[0].shape[1]))
    moments = y.new_empty((y.shape[0], 2), dtype=torch.float32)
    launcher("embed_norm")(*ids, *tables, single(weight), single(bias), *drop, eps, y, moments)
    return y, moments


def backward(
    dy: Tensor, lookup: Lookup, moments: Tensor, weight: Tensor, drop: Drop, affine_needed: bool
) -> tuple[Tensor, Tensor]:
    ids, tables = lookup
    dsum = dy.new_empty(dy.shape)
    daffine = moments.new_empty((2, dy.shape[1])) if affine_needed else None
    launcher("embed_norm_backward")(
        dy, *ids, *tables, moments, single(weight), *drop, dsum, daffine
    )
    return dsum, moments.new_empty(0) if daffine is None else daffine


def add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    out = rows.new_zeros((count, rows.shape[1]))
    launcher("add_rows")(rows, index, out)
    return out
