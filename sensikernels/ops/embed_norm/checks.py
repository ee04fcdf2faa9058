"""What ``embed_norm`` and its operators demand of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels._core.values import require_within
from sensikernels.ops.common.checks import (
    check_count,
    check_drops,
    check_rank,
    check_tensor,
    described,
)

_IDS = ("input_ids", "position_ids", "token_type_ids")
_TABLES = ("word", "position", "token_type")


def check(
    ids: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> None:
    """Raise UsageError where shapes, dtypes, devices or, where they can be read, ids do not fit."""
    word = tables[0]
    if word.dim() != 2 or not word.is_floating_point():
        require(False, "word", "floating [V, hidden]", described(word))
    hidden, device, dtype = word.shape[1], word.device, word.dtype
    for name, table in zip(_TABLES, tables, strict=True):
        ok = table.dim() == 2 and table.shape[1] == hidden and table.dtype == dtype
        if not ok or table.device != device:
            require(False, name, f"{dtype} [n, {hidden}] on {device}", described(table))
    check_tensor(weight, "weight", (hidden,), None, device)
    if bias is not None:
        check_tensor(bias, "bias", (hidden,), None, device)
    shape = ids[0].shape
    for name, index, table in zip(_IDS, ids, tables, strict=True):
        check_tensor(index, name, shape, torch.int64, device)
        require_within(index, name, table.shape[0], what="ids")


def check_forward(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> None:
    """As ``check``, of lists of three, with the draws of the operator."""
    check_count(ids, "ids", 3)
    check_count(tables, "tables", 3)
    check(ids, tables, weight, bias)
    check_drops(seed, threshold, weight.device)
    if not eps >= 0.0:
        require(False, "eps", "a number >= 0", eps)


def check_backward(
    dy: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    moments: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
) -> None:
    """As ``check_forward``, with the gradient of the result and the forward's moments."""
    check_count(ids, "ids", 3)
    check_count(tables, "tables", 3)
    check(ids, tables, weight, None)
    word = tables[0]
    check_tensor(dy, "dy", (*ids[0].shape, word.shape[1]), word.dtype, word.device)
    wide = torch.promote_types(word.dtype, torch.float32)
    check_tensor(moments, "moments", (ids[0].numel(), 2), wide, word.device)
    check_drops(seed, threshold, word.device)


def check_rows(rows: Tensor, index: Tensor, count: int) -> None:
    """``index`` names one of ``count`` rows for each of ``rows [tokens, hidden]``."""
    check_rank(rows, "rows", 2)
    if count < 0:
        require(False, "count", "a number of rows", count)
    if index.numel() != rows.shape[0] or index.dtype != torch.int64 or index.device != rows.device:
        want = f"{rows.shape[0]} of torch.int64 on {rows.device}"
        require(False, "index", want, described(index))
    require_within(index, "index", count)
