"""The operators ``sensikernels::varlen_attention`` and its backward; the backend is an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from sensikernels.ops.common.register import register
from sensikernels.ops.varlen_attention import buckets, flash, native
from sensikernels.ops.varlen_attention.call import call_of, unit_stride
from sensikernels.ops.varlen_attention.checks import checked, checked_backward

Results = tuple[Tensor, Tensor, Tensor]


def launch_forward(*arguments: Any) -> Results:
    """``(out, logsumexp, rng_state)`` by the kernel that is named, of checked arguments."""
    *rest, backend = arguments
    call = call_of(*rest)
    if backend == "flash":
        return flash.forward(call)
    none = call.query.new_empty(0)
    if backend == "native":
        return *native.forward(call), none
    return buckets.forward(call), none, call.query.new_empty(0)


def launch_backward(dout: Tensor, *arguments: Any) -> Results:
    """``(dq, dk, dv)``, as ``launch_forward``."""
    out, lse, state, *rest, backend = arguments
    call, dout = call_of(*rest), unit_stride(dout)
    if backend == "flash":
        return flash.backward(dout, flash.Saved(out, lse, state), call)
    return (native if backend == "native" else buckets).backward(dout, call)


def _empty(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Results:
    tokens, heads, _ = query.shape
    backend = rest[-1]
    lse, state = query.new_empty(0), query.new_empty(0)
    if backend in ("flash", "native"):
        lse = query.new_empty((heads, tokens), dtype=torch.float32)
    if backend == "flash":
        state = query.new_empty(2, dtype=torch.uint64)
    return query.new_empty((tokens, heads, value.shape[2])), lse, state


def _empty_backward(dout: Tensor, out: Tensor, lse: Tensor, state: Tensor, *call: Any) -> Results:
    dq, dk, dv = (x.new_empty(x.shape) for x in call[:3])
    return dq, dk, dv


_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_query, Tensor cu_seqlens, "
    "Tensor seed, SymInt max_length_query, SymInt max_length, int threshold, float scale, "
    "SymInt? window, str backend"
)
register(
    f"varlen_attention({_CALL}) -> (Tensor out, Tensor logsumexp, Tensor rng_state)",
    checked,
    launch_forward,
    _empty,
)
register(
    "varlen_attention_backward(Tensor dout, Tensor out, Tensor logsumexp, Tensor rng_state, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)",
    checked_backward,
    launch_backward,
    _empty_backward,
)


def pairs_of(call: tuple[Any, ...]) -> int:
    """The pairs of query and key that the operator's arguments let meet, of one head.

    Without data all sequences are longest.
    """
    query, key, _, cu_query, cu_key, _, _, max_key, _, _, window, _ = call
    if isinstance(cu_key, FakeTensor) or cu_key.is_meta:
        met = max_key if window is None else min(max_key, 2 * window + 1)
        return int(query.shape[0] * met)
    keys = cu_key.long().diff()
    queries = keys if cu_query is None else cu_query.long().diff()
    if window is None:
        return int((queries * keys).sum())
    # Query i meets keys from max(0, i - window) up to min(keys, i + window + 1).
    window = min(window, max(query.shape[0], key.shape[0]))  # its square has to be a number
    cut = torch.minimum((keys - window - 1).clamp_min(0), queries)
    ends = cut * (window + 1) + cut * (cut - 1) // 2 + (queries - cut) * keys
    late = (queries - window - 1).clamp_min(0)
    short = torch.minimum(late, keys)
    begins = short * (short + 1) // 2 + (late - short) * keys
    return int((ends - begins).sum())


def _flops(call: tuple[Any, ...], of_query: int, of_value: int) -> int:
    """FLOPs of so many products over query's and value's size."""
    query, _, value = call[:3]
    each = of_query * query.shape[2] + of_value * value.shape[2]
    return 2 * pairs_of(call) * int(query.shape[1]) * int(each)


@register_flop_formula(torch.ops.sensikernels.varlen_attention, get_raw=True)
def _forward_flops(*call: Any, **_: Any) -> int:
    """Two products: scores over query's size, the result over value's."""
    return _flops(call, 1, 1)


@register_flop_formula(torch.ops.sensikernels.varlen_attention_backward, get_raw=True)
def _backward_flops(*arguments: Any, **_: Any) -> int:
    """Five products: scores again, dQ, dK over query's size; dP, dV over value's."""
    return _flops(arguments[4:], 3, 2)
