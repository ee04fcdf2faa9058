"""Launchers of the compiled kernels: as the reference, for flat contiguous ids."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher


def forward(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tokens, hidden = ids[0].numel(), tables[0].shape[1]
    y = tables[0].new_empty((tokens, hidden))
    moments = y.new_empty((tokens, 2), dtype=torch.float32)
    launcher("embed_norm")(
        *ids, *tables, weight.float(), bias.float(), seed, threshold, eps, y, moments
    )
    return y, moments


def backward(
    dy: Tensor,
    ids: list[Tensor],
    tables: list[Tensor],
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
) -> tuple[Tensor, Tensor]:
    dsum = dy.new_empty(dy.shape)
    daffine = moments.new_empty((2, dy.shape[1])) if affine_needed else None
    launcher("embed_norm_backward")(
        dy, *ids, *tables, moments, weight.float(), seed, threshold, dsum, daffine
    )
    return dsum, moments.new_empty(0) if daffine is None else daffine


def add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    out = rows.new_zeros((count, rows.shape[1]))
    launcher("add_rows")(rows, index, out)
    return out
