"""Checks of the arguments of ``embed_norm`` and its operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels._core.values import require_within
from sensikernels.ops.common.checks import (
    check_count,
    check_drops,
    check_rank,
    check_tensor,
    described,
)
from sensikernels.ops.common.norms import check_affine, check_eps, wide
from sensikernels.ops.common.rowwise import resolve

_IDS = ("input_ids", "position_ids", "token_type_ids")
_TABLES = ("word", "position", "token_type")


def check(
    ids: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> None:
    """Raise UsageError where shapes, dtypes, devices or, where they can be read, ids do not fit."""
    word = tables[0]
    if word.dim() != 2 or not word.is_floating_point():
        raise expected("word", "floating [V, hidden]", described(word))
    hidden, device, dtype = word.shape[1], word.device, word.dtype
    for name, table in zip(_TABLES, tables, strict=True):
        ok = table.dim() == 2 and table.shape[1] == hidden and table.dtype == dtype
        if not ok or table.device != device:
            raise expected(name, f"{dtype} [n, {hidden}] on {device}", described(table))
    check_affine(weight, bias, (hidden,), device)
    shape = ids[0].shape
    for name, index, table in zip(_IDS, ids, tables, strict=True):
        check_tensor(index, name, shape, torch.int64, device)
        require_within(index, name, table.shape[0], what="ids")


def checked(
    ids: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """The operator's arguments, of lists of three, with the backend that serves them."""
    seed, threshold, eps, backend = rest
    _check_lists(ids, tables, weight, bias)
    check_drops(seed, threshold, weight.device)
    check_eps(eps)
    return ids, tables, weight, bias, seed, threshold, eps, resolve(tables[0], backend)


def checked_backward(
    dy: Tensor, ids: Sequence[Tensor], tables: Sequence[Tensor], moments: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """The arguments of the backward operator: the result's gradient, and the forward's moments."""
    weight, seed, threshold, affine_needed, backend = rest
    _check_lists(ids, tables, weight, None)
    word = tables[0]
    check_tensor(dy, "dy", (*ids[0].shape, word.shape[1]), word.dtype, word.device)
    check_tensor(moments, "moments", (ids[0].numel(), 2), wide(word.dtype), word.device)
    check_drops(seed, threshold, word.device)
    drop = seed, threshold
    return dy, ids, tables, moments, weight, *drop, affine_needed, resolve(dy, backend)


def checked_rows(
    rows: Tensor, index: Tensor, count: int, backend: str
) -> tuple[Tensor, Tensor, int, str]:
    """``index`` names one of ``count`` rows for each of ``rows [tokens, hidden]``."""
    check_rank(rows, "rows", 2)
    if count < 0:
        raise expected("count", "a number of rows", count)
    if index.numel() != rows.shape[0] or index.dtype != torch.int64 or index.device != rows.device:
        wanted = f"{rows.shape[0]} of torch.int64 on {rows.device}"
        raise expected("index", wanted, described(index))
    require_within(index, "index", count)
    return rows, index, count, resolve(rows, backend)


def _check_lists(
    ids: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> None:
    check_count(ids, "ids", 3)
    check_count(tables, "tables", 3)
    check(ids, tables, weight, bias)
