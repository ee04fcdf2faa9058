"""The operators ``sensikernels::varlen_attention`` and its backward; the backend is an argument."""

from __future__ import annotations

from operator import sub
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels._checks import require
from sensikernels.ops.varlen_attention import buckets, flash, native

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_query, Tensor cu_seqlens, "
    "Tensor seed, SymInt max_length_query, SymInt max_length, int threshold, float scale, "
    "str backend"
)
_LIB.define(f"varlen_attention({_CALL}) -> (Tensor out, Tensor logsumexp, Tensor rng_state)")
_LIB.define(
    "varlen_attention_backward(Tensor dout, Tensor out, Tensor logsumexp, Tensor rng_state, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)"
)


def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_unit_stride(x) for x in (query, key, value))
    where = _offsets(cu_query, cu_key)
    if cu_key.device.type == "cpu":
        check_offsets(cu_key, len(key), max_key, "cu_seqlens", "max_length")
        if cu_query is not None:
            names = ("cu_seqlens_query", "max_length_query")
            check_offsets(cu_query, len(query), max_query, *names)
    if backend == "flash":
        return flash.forward(q, k, v, *where, max_query, max_key, threshold, scale)
    if backend == "native":
        out, lse = native.forward(q, k, v, *where, seed, threshold, scale)
        return out, lse, q.new_empty(0)
    out = buckets.forward(q, k, v, *where, seed, max_query, max_key, threshold, scale)
    return out, q.new_empty(0), q.new_empty(0)


def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d, q, k, v = (_unit_stride(x) for x in (dout, query, key, value))
    where = _offsets(cu_query, cu_key)
    if backend == "flash":
        lengths = (max_query, max_key)
        return flash.backward(d, q, k, v, out, lse, state, *where, *lengths, threshold, scale)
    if backend == "native":
        return native.backward(d, q, k, v, *where, seed, threshold, scale)
    lengths = (max_query, max_key)
    return buckets.backward(d, q, k, v, *where, seed, *lengths, threshold, scale)


for _device in ("CPU", "CUDA"):
    _LIB.impl("varlen_attention", _forward, _device)
    _LIB.impl("varlen_attention_backward", _backward, _device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _offsets(cu_query: Tensor | None, cu_key: Tensor) -> tuple[Tensor, Tensor]:
    """Both, contiguous; without ``cu_query`` queries are where keys are."""
    cu_key = cu_key.contiguous()
    return (cu_key if cu_query is None else cu_query.contiguous()), cu_key


def check_offsets(cu: Tensor, tokens: int, longest: int, name: str, length_name: str) -> None:
    """Raise UsageError unless ``cu`` ascends from 0 to at most ``tokens`` by ``longest`` steps."""
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


@torch.library.register_fake("sensikernels::varlen_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _ = query.shape
    backend = rest[-1]
    lse = query.new_empty(0)
    if backend in ("flash", "native"):
        lse = query.new_empty((heads, tokens), dtype=torch.float32)
    state = query.new_empty(0)
    if backend == "flash":
        state = query.new_empty(2, dtype=torch.uint64)
    return query.new_empty((tokens, heads, value.shape[2])), lse, state


@torch.library.register_fake("sensikernels::varlen_attention_backward")
def _(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    return dq, dk, dv


def _pairs(cu_query: Tensor | None, cu_key: Tensor, tokens: int, max_key: int) -> int:
    """Sum of queries times keys; on tensors without data ``tokens`` times the longest."""
    if isinstance(cu_key, FakeTensor) or cu_key.is_meta:
        return tokens * max_key
    cu_query, cu_key = _offsets(cu_query, cu_key)
    return int((cu_query.long().diff() * cu_key.long().diff()).sum())


@register_flop_formula(torch.ops.sensikernels.varlen_attention, get_raw=True)
def _forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor | None,
    cu_key: Tensor,
    seed: Tensor,
    max_query: int,
    max_key: int,
    *_: Any,
    **__: Any,
) -> int:
    """Two products."""
    pairs = _pairs(cu_query, cu_key, query.shape[0], max_key)
    return 2 * pairs * query.shape[1] * (query.shape[2] + value.shape[2])


@register_flop_formula(torch.ops.sensikernels.varlen_attention_backward, get_raw=True)
def _backward_flops(
    dout: Tensor, out: Tensor, lse: Tensor, state: Tensor, *call: Any, **_: Any
) -> int:
    """Five products: scores again, dP, dV over value's size; dQ, dK over query's."""
    query, _key, value, cu_query, cu_key, _seed, _max_query, max_key = call[:8]
    pairs = _pairs(cu_query, cu_key, query.shape[0], max_key)
    return 2 * pairs * query.shape[1] * (3 * query.shape[2] + 2 * value.shape[2])
