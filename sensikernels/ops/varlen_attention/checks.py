"""What ``varlen_attention`` and its operators demand of their arguments."""

from __future__ import annotations

from operator import sub

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels._core.values import readable
from sensikernels.ops.common.checks import check_drops, check_tensor, described


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor | None,
    cu_key: Tensor,
    seed: Tensor | None,
    lengths: tuple[int, int],
) -> None:
    """Raise UsageError where shapes, devices or, where they can be read, offsets do not fit.

    Without ``cu_query`` queries are where keys are. ``lengths``: of the longest query and key
    sequence. The dtypes of query, key and value may differ until autocast has made them one.
    """
    _check_operands(query, key, value)
    device = query.device
    if cu_query is None and query.shape[0] != key.shape[0]:
        require(False, "query", f"{key.shape[0]} rows as key", query.shape[0])
    for name, length in zip(("max_length", "max_length_query"), lengths[::-1], strict=True):
        if length < 0:
            require(False, name, "a length", length)
    if cu_key.dtype != torch.int32 or cu_key.dim() != 1 or cu_key.shape[0] < 1:
        want = f"int32 [sequences + 1] on {device}"
        require(False, "cu_seqlens", want, described(cu_key))
    check_tensor(cu_key, "cu_seqlens", cu_key.shape, torch.int32, device)
    _check_offsets(cu_key, key.shape[0], lengths[1], "cu_seqlens", "max_length")
    if cu_query is not None:
        check_tensor(cu_query, "cu_seqlens_query", cu_key.shape, torch.int32, device)
        names = ("cu_seqlens_query", "max_length_query")
        _check_offsets(cu_query, query.shape[0], lengths[0], *names)
    if seed is not None:
        check_tensor(seed, "seed", (), torch.int64, device)


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor | None,
    cu_key: Tensor,
    seed: Tensor,
    max_query: int,
    max_key: int,
    threshold: int,
    scale: float,
) -> None:
    """As ``check``, of one dtype, for the operator."""
    check(query, key, value, cu_query, cu_key, seed, (max_query, max_key))
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            require(False, name, f"dtype {query.dtype} as query", t.dtype)
    check_drops(seed, threshold, query.device)


def check_saved(dout: Tensor, out: Tensor, lse: Tensor, query: Tensor, value: Tensor) -> None:
    """A gradient like the result, and what the forward kept, empty where it keeps nothing."""
    shape = (*query.shape[:2], value.shape[2])
    check_tensor(dout, "dout", shape, query.dtype, query.device)
    if out.shape != (0,):
        check_tensor(out, "out", shape, query.dtype, query.device)
    if lse.shape != (0,):
        wanted = (query.shape[1], query.shape[0])
        check_tensor(lse, "logsumexp", wanted, torch.float32, query.device)


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3:
        require(False, "query", "[tokens_q, heads, qk_size]", list(query.shape))
    if not query.is_floating_point():
        require(False, "query", "a floating dtype", query.dtype)
    _, heads, size = query.shape
    if key.dim() != 3 or key.shape[1] != heads or key.shape[2] != size:
        require(False, "key", f"[tokens, {heads}, {size}]", list(key.shape))
    if value.dim() != 3 or value.shape[0] != key.shape[0] or value.shape[1] != heads:
        require(False, "value", f"[{key.shape[0]}, {heads}, vo_size]", list(value.shape))
    for name, x in (("key", key), ("value", value)):
        if x.device != query.device:
            require(False, name, f"a tensor on {query.device}", x.device)


def _check_offsets(cu: Tensor, tokens: int, longest: int, name: str, length_name: str) -> None:
    """Offsets ascend from 0 to at most ``tokens`` by at most ``longest``, if they can be read."""
    if not readable(cu):
        return
    at = cu.tolist()
    steps = list(map(sub, at[1:], at))
    if at[0] != 0:
        require(False, name, "0 first", at[0])
    if steps and min(steps) < 0:
        require(False, name, "ascending offsets", at)
    if at[-1] > tokens:
        require(False, name, f"at most {tokens} rows", at[-1])
    if steps and max(steps) > longest:
        require(False, length_name, f"at least the longest sequence, {max(steps)}", longest)
