"""The operators ``sensikernels::embed_norm``, its backward, and the sum into a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sensikernels.ops.common.drops import Drop
from sensikernels.ops.common.norms import wide
from sensikernels.ops.common.register import register
from sensikernels.ops.common.rowwise import kernels, rows
from sensikernels.ops.embed_norm.checks import checked, checked_backward, checked_rows
from sensikernels.ops.embed_norm.reference import Lookup

Tensors = Sequence[Tensor]


def forward(
    ids: Tensors, tables: Tensors, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``(y, moments)`` by the kernels of ``backend``, of the operator's checked arguments."""
    seed, threshold, eps, backend = rest
    run = kernels("embed_norm", backend).forward
    norm = weight.contiguous(), bias.contiguous()
    y, moments = run(_lookup(ids, tables), *norm, Drop(seed, threshold), eps)
    return y if ids[0].dim() == 1 else y.view(*ids[0].shape, y.shape[1]), moments


def backward(
    dy: Tensor, ids: Tensors, tables: Tensors, moments: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``(dsum, daffine)``; daffine is empty unless it is needed."""
    seed, threshold, affine_needed, backend = rest
    run = kernels("embed_norm", backend).backward
    saved = _lookup(ids, tables), moments.contiguous(), weight.contiguous()
    dsum, daffine = run(rows(dy), *saved, Drop(seed, threshold), affine_needed)
    return dsum, daffine


def add_rows(rows: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    """``[count, hidden]``: the sums of the rows of each index."""
    run = kernels("embed_norm", backend).add_rows
    out: Tensor = run(rows.contiguous(), index.flatten().contiguous(), count)
    return out


def _lookup(ids: Tensors, tables: Tensors) -> Lookup:
    return Lookup([i.flatten().contiguous() for i in ids], [t.contiguous() for t in tables])


def _empty(ids: Tensors, tables: Tensors, *_: object) -> tuple[Tensor, Tensor]:
    word = tables[0]
    moments = word.new_empty((ids[0].numel(), 2), dtype=wide(word.dtype))
    return word.new_empty((*ids[0].shape, word.shape[1])), moments


def _empty_backward(
    dy: Tensor, ids: Tensors, tables: Tensors, moments: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, affine_needed, _ = rest
    daffine = moments.new_empty((2, dy.shape[-1]) if affine_needed else 0)
    return dy.new_empty((ids[0].numel(), dy.shape[-1])), daffine


def _empty_rows(rows: Tensor, index: Tensor, count: int, _: str) -> Tensor:
    return rows.new_empty((count, rows.shape[1]))


register(
    "embed_norm(Tensor[] ids, Tensor[] tables, Tensor weight, Tensor bias, Tensor? seed,"
    " int threshold, float eps, str backend) -> (Tensor, Tensor)",
    checked,
    forward,
    _empty,
)
register(
    "embed_norm_backward(Tensor dy, Tensor[] ids, Tensor[] tables, Tensor moments,"
    " Tensor weight, Tensor? seed, int threshold, bool affine_needed, str backend)"
    " -> (Tensor, Tensor)",
    checked_backward,
    backward,
    _empty_backward,
)
register(
    "add_rows(Tensor rows, Tensor index, int count, str backend) -> Tensor",
    checked_rows,
    add_rows,
    _empty_rows,
)
