"""Checks of the arguments of ``varlen_attention`` and its operators."""

from __future__ import annotations

from operator import sub
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import expected, require
from sensikernels._core.values import readable
from sensikernels.ops.common.checks import check_drops, check_tensor, described
from sensikernels.ops.varlen_attention.choice import check_kernels


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor | None,
    cu_key: Tensor,
    lengths: tuple[int, int],
) -> None:
    """Raise UsageError where shapes, devices or, where they can be read, offsets do not fit.

    Without ``cu_query`` queries are where keys are. ``lengths``: of the longest query and key
    sequence. The dtypes of query, key and value may differ until autocast has made them one.
    """
    _check_operands(query, key, value)
    device = query.device
    if cu_query is None and query.shape[0] != key.shape[0]:
        raise expected("query", f"{key.shape[0]} rows as key", query.shape[0])
    max_query, max_key = lengths
    if max_key < 0:
        raise expected("max_length", "a length", max_key)
    if max_query < 0:
        raise expected("max_length_query", "a length", max_query)
    offsets = cu_key.dtype == torch.int32 and cu_key.dim() == 1 and cu_key.shape[0] >= 1
    if not offsets or cu_key.device != device:
        raise expected("cu_seqlens", f"int32 [sequences + 1] on {device}", described(cu_key))
    _check_offsets(cu_key, key.shape[0], max_key, "cu_seqlens", "max_length")
    if cu_query is not None:
        check_tensor(cu_query, "cu_seqlens_query", cu_key.shape, torch.int32, device)
        names = ("cu_seqlens_query", "max_length_query")
        _check_offsets(cu_query, query.shape[0], max_query, *names)


def check_window(window: int | None) -> None:
    """Raise UsageError unless ``window`` is a number of places to either side, or None."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)) or window < 0:
        raise expected("window", "a number of tokens, 0 or more, or None", window)


def checked(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The operator's arguments: as ``check``, of one dtype, and kernels that serve them."""
    cu_query, cu_key, seed, *lengths, threshold, _, window, backend = rest
    check(query, key, value, cu_query, cu_key, (lengths[0], lengths[1]))
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise expected(name, f"dtype {query.dtype} as query", t.dtype)
    check_window(window)
    check_drops(seed, threshold, query.device)
    apart = window is not None and cu_query is not None
    check_kernels(query, value, backend, apart=apart)
    return query, key, value, *rest


def checked_backward(
    dout: Tensor, out: Tensor, logsumexp: Tensor, rng_state: Tensor, *call: Any
) -> tuple[Any, ...]:
    """The arguments of the backward operator: a gradient like the result, the forward's results.

    Those are empty where the backend keeps nothing.
    """
    query, _, value, *_, backend = checked(*call)
    shape = (*query.shape[:2], value.shape[2])
    check_tensor(dout, "dout", shape, query.dtype, query.device)
    if out.shape != (0,):
        check_tensor(out, "out", shape, query.dtype, query.device)
    if logsumexp.shape != (0,):
        wanted = (query.shape[1], query.shape[0])
        check_tensor(logsumexp, "logsumexp", wanted, torch.float32, query.device)
    if backend == "flash":
        require(out.dim() == 3, "out", "the forward's result, which flash reads", list(out.shape))
        shape = logsumexp.shape
        require(len(shape) == 2, "logsumexp", "the forward's, which flash reads", list(shape))
    return dout, out, logsumexp, rng_state, *call


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3:
        raise expected("query", "[tokens_q, heads, qk_size]", list(query.shape))
    if not query.is_floating_point():
        raise expected("query", "a floating dtype", query.dtype)
    _, heads, size = query.shape
    if key.dim() != 3 or key.shape[1] != heads or key.shape[2] != size:
        raise expected("key", f"[tokens, {heads}, {size}]", list(key.shape))
    if value.dim() != 3 or value.shape[0] != key.shape[0] or value.shape[1] != heads:
        raise expected("value", f"[{key.shape[0]}, {heads}, vo_size]", list(value.shape))
    for name, x in (("key", key), ("value", value)):
        if x.device != query.device:
            raise expected(name, f"a tensor on {query.device}", x.device)


def _check_offsets(cu: Tensor, tokens: int, longest: int, name: str, length_name: str) -> None:
    """Offsets ascend from 0 to at most ``tokens`` by at most ``longest``, if they can be read."""
    if not readable(cu):
        return
    at = cu.tolist()
    steps = list(map(sub, at[1:], at))
    if at[0] != 0:
        raise expected(name, "0 first", at[0])
    if steps and min(steps) < 0:
        raise expected(name, "ascending offsets", at)
    if at[-1] > tokens:
        raise expected(name, f"at most {tokens} rows", at[-1])
    if steps and max(steps) > longest:
        raise expected(length_name, f"at least the longest sequence, {max(steps)}", longest)
