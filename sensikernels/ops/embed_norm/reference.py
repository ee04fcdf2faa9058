"""The definition, differentiated by autograd, and the two halves of the operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.philox import DRAWS, dropped


def embed_norm(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    sparse: bool,
) -> Tensor:
    """``dropout(LayerNorm(Σ tables[i][ids[i]]) · weight + bias)``, in float32 at least.

    ``sparse`` makes the gradient of the first table a sparse tensor.
    """
    dtype = tables[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    word, position, kind = (
        F.embedding(i, table, sparse=sparse and n == 0).to(wide)
        for n, (i, table) in enumerate(zip(ids, tables, strict=True))
    )
    z = word + position + kind
    y = F.layer_norm(z, z.shape[-1:], weight.to(wide), bias.to(wide), eps)
    drops = seed is not None and threshold != DRAWS
    return (dropped(y, seed, threshold) if drops and seed is not None else y).to(dtype)


def forward(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(y, moments)`` of flat ids: ``[tokens, hidden]`` and mean, 1 / standard deviation."""
    z = _sum(ids, tables)
    # Together, by Welford: the mean of a row of equal elements is that element.
    variance, mean = torch.var_mean(z, 1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    y = (z - mean) * rstd * weight + bias
    y = y if seed is None else dropped(y, seed, threshold)
    return y.to(tables[0].dtype), torch.cat([mean, rstd], 1)


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
    """``(dsum, daffine)``: ``[tokens, hidden]`` in dy's dtype and ``[2, hidden]`` (empty if not
    needed) in that of moments. The sum is gathered again.
    """
    mean, rstd = moments.split(1, 1)
    normal = (_sum(ids, tables) - mean) * rstd
    wide = dy.to(moments.dtype)
    wide = wide if seed is None else dropped(wide, seed, threshold)
    g = wide * weight
    dz = rstd * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))
    daffine = torch.stack([(wide * normal).sum(0), wide.sum(0)]) if affine_needed else None
    return dz.to(dy.dtype), moments.new_empty(0) if daffine is None else daffine


def add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """``[count, hidden]`` in the dtype of ``rows``: row r is the sum of the rows of index r."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_zeros((count, rows.shape[1]), dtype=wide)
    return out.index_add_(0, index, rows.to(wide)).to(rows.dtype)


def _sum(ids: list[Tensor], tables: list[Tensor]) -> Tensor:
    wide = torch.promote_types(tables[0].dtype, torch.float32)
    word, position, kind = (table[i].to(wide) for i, table in zip(ids, tables, strict=True))
    return word + position + kind
