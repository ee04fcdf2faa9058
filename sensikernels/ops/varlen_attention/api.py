"""``varlen_attention``: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels._core.philox import DRAWS
from sensikernels.ops.common.checks import check_tensor
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.drops import new_seed, threshold_of
from sensikernels.ops.varlen_attention import checks, reference
from sensikernels.ops.varlen_attention.autograd import VarlenAttention
from sensikernels.ops.varlen_attention.call import call_of
from sensikernels.ops.varlen_attention.choice import choice, serving


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_length: int,
    cu_seqlens_query: Tensor | None = None,
    max_length_query: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    seed: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(softmax(scale Q Kᵀ)) V of each packed sequence and head, in both directions.

    Sequence s has keys ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, its queries likewise by
    ``cu_seqlens_query``. Rows after the last offset are padding: output and gradients are zero
    there. A query without keys gives zero. Dropout zeroes probabilities and scales the others
    by 65536 / k, k = round((1 - dropout) 65536); except with ``flash`` the mask depends on seed,
    head, query row and key alone: not on dtype, device, threads, strides, window or backend.

    Args:
        query: ``[tokens_q, heads, qk_size]``; slices of a fused projection are read in place.
        key, value: ``[tokens, heads, qk_size]`` and ``[tokens, heads, vo_size]``.
        cu_seqlens: int32 ``[sequences + 1]``, ascending from 0 to at most ``tokens``.
        max_length: at least the longest sequence (on the CPU that is checked).
        cu_seqlens_query: where queries are counted otherwise; ``cu_seqlens`` if absent.
        max_length_query: as ``max_length``, with ``cu_seqlens_query`` only.
        dropout: probability in [0, 1].
        scale: 1 / sqrt(qk_size) if absent.
        seed: int64 ``[]`` on query's device; drawn from torch's generator of it if absent.
        window: a query meets keys at most so many places of its sequence away; None: all. It is
            transformers' ``config.sliding_window`` of a ModernBERT (half of ``local_attention``).
        backend: "auto" (``explain`` says what), "reference", "native", "flash" or "buckets".

    Returns:
        ``[tokens_q, heads, vo_size]``, contiguous, in query's dtype; under autocast in its dtype.
        Differentiable once; with "reference" as often as PyTorch.

    Raises:
        UsageError: shapes, dtypes, devices or offsets disagree, a negative window, or a named
            backend cannot serve ("flash": a window over queries that are counted apart).
    """
    lengths = _lengths(max_length, cu_seqlens_query, max_length_query)
    checks.check(query, key, value, cu_seqlens_query, cu_seqlens, lengths)
    if seed is not None:
        check_tensor(seed, "seed", (), torch.int64, query.device)
    checks.check_window(window)
    threshold = threshold_of(dropout)
    casts = query.device.type != "meta" and torch.is_autocast_enabled(query.device.type)
    query, key, value = _of_one_dtype(query, key, value, casts)
    drops = threshold < DRAWS
    apart = window is not None and cu_seqlens_query is not None
    chosen = serving(query, value, backend, seeded=drops and seed is not None, apart=apart)
    seed = _seed(cu_seqlens, drops and chosen != "flash") if seed is None else seed
    scale = (query.shape[2] or 1) ** -0.5 if scale is None else scale
    places = (cu_seqlens_query, cu_seqlens, seed, *lengths)
    return _run(casts, query, key, value, *places, threshold, scale, window, chosen)


def _lengths(keys: int, cu_query: Tensor | None, queries: int | None) -> tuple[int, int]:
    """The lengths of the longest query and key sequence."""
    if cu_query is None:
        if queries is not None:
            raise expected("max_length_query", "None for self attention", queries)
        return keys, keys
    if queries is None:
        raise expected("max_length_query", "the longest query count", None)
    return queries, keys


def _of_one_dtype(
    query: Tensor, key: Tensor, value: Tensor, casts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands, in autocast's dtype if it ``casts``; float64 queries keep theirs."""
    if casts and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise expected("key, value", f"{query.dtype} as query", f"{key.dtype}, {value.dtype}")
    return query, key, value


def _seed(cu_seqlens: Tensor, drawn: bool) -> Tensor:
    return new_seed(cu_seqlens.device) if drawn else cu_seqlens.new_zeros((), dtype=torch.int64)


def _run(casts: bool, *arguments: Any) -> Tensor:
    if casts:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return _run(False, *arguments)
    *call, backend = arguments
    if backend == "reference":
        return reference.varlen_attention(call_of(*call))
    out: Tensor = VarlenAttention.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def explain(
    query: Tensor,
    value: Tensor,
    backend: str = "auto",
    *,
    seeded: bool = False,
    apart: bool = False,
) -> Choice:
    """The backend that serves such tensors, and why; UsageError for a named one that cannot.

    ``seeded``: dropout with a given seed; ``apart``: a window over queries counted apart.
    """
    return choice(query, value, backend, seeded=seeded, apart=apart)
