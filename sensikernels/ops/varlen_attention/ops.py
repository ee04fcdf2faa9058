"""The operators ``sensikernels::varlen_attention`` and its backward; the backend is an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels._core.checks import require
from sensikernels.ops.varlen_attention import buckets, flash, native
from sensikernels.ops.varlen_attention.checks import check_call, check_saved
from sensikernels.ops.varlen_attention.choice import check_kernels

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


def launch_forward(
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
    """Checked arguments to the kernel that ``backend`` names."""
    q, k, v = (_unit_stride(x) for x in (query, key, value))
    where = _offsets(cu_query, cu_key)
    if backend == "flash":
        return flash.forward(q, k, v, *where, max_query, max_key, threshold, scale)
    if backend == "native":
        out, lse = native.forward(q, k, v, *where, seed, threshold, scale)
        return out, lse, q.new_empty(0)
    out = buckets.forward(q, k, v, *where, seed, max_query, max_key, threshold, scale)
    return out, q.new_empty(0), q.new_empty(0)


def launch_backward(
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
    """As ``launch_forward``."""
    d, q, k, v = (_unit_stride(x) for x in (dout, query, key, value))
    where, lengths = _offsets(cu_query, cu_key), (max_query, max_key)
    if backend == "flash":
        return flash.backward(d, q, k, v, out, lse, state, *where, *lengths, threshold, scale)
    if backend == "native":
        return native.backward(d, q, k, v, *where, seed, threshold, scale)
    return buckets.backward(d, q, k, v, *where, seed, *lengths, threshold, scale)


def _check_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    *call, backend = rest
    check_call(query, key, value, *call)
    check_kernels(query, value, backend)


def _check_backward(
    dout: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> None:
    _check_forward(query, key, value, *rest)
    check_saved(dout, out, lse, query, value)
    if rest[-1] == "flash":
        require(out.dim() == 3, "out", "the forward's result, which flash reads", list(out.shape))
        require(lse.dim() == 2, "logsumexp", "the forward's, which flash reads", list(lse.shape))


def _forward(*call: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(*call)
    return launch_forward(*call)


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, state: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(dout, out, lse, *call)
    return launch_backward(dout, out, lse, state, *call)


for _device in ("CPU", "CUDA"):
    _LIB.impl("varlen_attention", _forward, _device)
    _LIB.impl("varlen_attention_backward", _backward, _device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _offsets(cu_query: Tensor | None, cu_key: Tensor) -> tuple[Tensor, Tensor]:
    """Both, contiguous; without ``cu_query`` queries are where keys are."""
    cu_key = cu_key.contiguous()
    return (cu_key if cu_query is None else cu_query.contiguous()), cu_key


@torch.library.register_fake("sensikernels::varlen_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(query, key, value, *rest)
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
    _check_backward(dout, out, lse, query, key, value, *rest)
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
