"""The definition, differentiated by autograd, and the two halves of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.common import norms
from sensikernels.ops.common.drops import Drop


class Lookup(NamedTuple):
    """Three tables ``[rows, hidden]`` and the rows of each that tokens take, of one shape."""

    ids: Sequence[Tensor]
    tables: Sequence[Tensor]

    def summed(self) -> Tensor:
        """The sum of each token's three rows, in float32 at least."""
        wide = norms.wide(self.tables[0].dtype)
        word, position, kind = (
            table[i].to(wide) for i, table in zip(self.ids, self.tables, strict=True)
        )
        return word + position + kind


def embed_norm(
    lookup: Lookup, weight: Tensor, bias: Tensor, drop: Drop, eps: float, sparse: bool
) -> Tensor:
    """``dropout(LayerNorm(Σ tables[i][ids[i]]) · weight + bias)``, in float32 at least.

    ``sparse`` makes the gradient of the first table a sparse tensor.
    """
    dtype = lookup.tables[0].dtype
    wide = norms.wide(dtype)
    word, position, kind = (
        F.embedding(i, table, sparse=sparse and n == 0).to(wide)
        for n, (i, table) in enumerate(zip(*lookup, strict=True))
    )
    z = word + position + kind
    y = F.layer_norm(z, z.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return drop.applied(y).to(dtype)


def forward(
    lookup: Lookup, weight: Tensor, bias: Tensor, drop: Drop, eps: float
) -> tuple[Tensor, Tensor]:
    """``(y, moments)``: ``[tokens, hidden]`` and mean, 1 / standard deviation ``[tokens, 2]``."""
    y, moments = norms.normalize(lookup.summed(), weight, bias, eps)
    return drop.applied(y).to(lookup.tables[0].dtype), moments


def backward(
    dy: Tensor, lookup: Lookup, moments: Tensor, weight: Tensor, drop: Drop, affine_needed: bool
) -> tuple[Tensor, Tensor]:
    """``(dsum, daffine)``: ``[tokens, hidden]`` in dy's dtype and ``[2, hidden]`` (empty if not
    needed) in that of moments. The sum is gathered again.
    """
    mean, rstd = moments.split(1, 1)
    normal = (lookup.summed() - mean) * rstd
    wide = drop.applied(dy.to(moments.dtype))
    dz = norms.normalize_backward(wide, normal, rstd, weight)
    daffine = norms.affine_gradient(wide, normal) if affine_needed else moments.new_empty(0)
    return dz.to(dy.dtype), daffine


def add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """``[count, hidden]`` in the dtype of ``rows``: row r is the sum of the rows of index r."""
    wide = norms.wide(rows.dtype)
    out = rows.new_zeros((count, rows.shape[1]), dtype=wide)
    return out.index_add_(0, index, rows.to(wide)).to(rows.dtype)
