"""The operators ``sensikernels::embed_norm``, its backward, and the sum into a table."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.common.rowwise import resolve, rows
from sensikernels.ops.embed_norm import native, reference
from sensikernels.ops.embed_norm.checks import check_backward, check_forward, check_rows

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define(
    "embed_norm(Tensor[] ids, Tensor[] tables, Tensor weight, Tensor bias, Tensor? seed,"
    " int threshold, float eps, str backend) -> (Tensor, Tensor)"
)
_LIB.define(
    "embed_norm_backward(Tensor dy, Tensor[] ids, Tensor[] tables, Tensor moments,"
    " Tensor weight, Tensor? seed, int threshold, bool affine_needed, str backend)"
    " -> (Tensor, Tensor)"
)
_LIB.define("add_rows(Tensor rows, Tensor index, int count, str backend) -> Tensor")


def kernels(backend: str) -> ModuleType:
    """The module that holds the launchers of ``backend``."""
    if backend == "triton":
        from sensikernels.ops.embed_norm import triton

        return triton
    return native if backend == "native" else reference


def _flat(ids: list[Tensor]) -> list[Tensor]:
    return [i.contiguous().view(-1) for i in ids]


def _dense(tables: list[Tensor]) -> list[Tensor]:
    return [table.contiguous() for table in tables]


def forward(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    affine = weight.contiguous(), bias.contiguous()
    y, moments = kernels(backend).forward(_flat(ids), _dense(tables), *affine, seed, threshold, eps)
    return y.view(*ids[0].shape, tables[0].shape[1]), moments


def backward(
    dy: Tensor,
    ids: list[Tensor],
    tables: list[Tensor],
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    saved = moments.contiguous(), weight.contiguous()
    dsum, daffine = kernels(backend).backward(
        rows(dy), _flat(ids), _dense(tables), *saved, seed, threshold, affine_needed
    )
    return dsum, daffine


def add_rows(rows: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    out: Tensor = kernels(backend).add_rows(rows.contiguous(), *_flat([index]), count)
    return out


def _forward(ids: list[Tensor], tables: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    *call, backend = rest
    check_forward(ids, tables, *call)
    call.append(resolve(tables[0], backend))
    return forward(ids, tables, *call)


def _backward(dy: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *call, affine_needed, backend = rest
    check_backward(dy, *call)
    call += affine_needed, resolve(dy, backend)
    return backward(dy, *call)


def _add_rows(rows: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    check_rows(rows, index, count)
    return add_rows(rows, index, count, resolve(rows, backend))


for _device in ("CPU", "CUDA"):
    _LIB.impl("embed_norm", _forward, _device)
    _LIB.impl("embed_norm_backward", _backward, _device)
    _LIB.impl("add_rows", _add_rows, _device)


@torch.library.register_fake("sensikernels::embed_norm")
def _(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_forward(ids, tables, weight, bias, seed, threshold, eps)
    word = tables[0]
    resolve(word, backend)
    wide = torch.promote_types(word.dtype, torch.float32)
    y = word.new_empty((*ids[0].shape, word.shape[1]))
    return y, word.new_empty((ids[0].numel(), 2), dtype=wide)


@torch.library.register_fake("sensikernels::embed_norm_backward")
def _(
    dy: Tensor,
    ids: list[Tensor],
    tables: list[Tensor],
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    affine_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_backward(dy, ids, tables, moments, weight, seed, threshold)
    resolve(dy, backend)
    daffine = moments.new_empty((2, dy.shape[-1]) if affine_needed else 0)
    return dy.new_empty((ids[0].numel(), dy.shape[-1])), daffine


@torch.library.register_fake("sensikernels::add_rows")
def _(rows: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    check_rows(rows, index, count)
    resolve(rows, backend)
    return rows.new_empty((count, rows.shape[1]))
