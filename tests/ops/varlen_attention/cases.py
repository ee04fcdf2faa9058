"""Packed operands, and one call with its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels.ops.varlen_attention import varlen_attention
from tests.tolerance import assert_close_to_reference

PADDING = 3


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """int32 ``[sequences + 1]``."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32).to(device)


def seed_of(value: int, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


def operands(
    lengths: Sequence[int],
    heads: int,
    sizes: tuple[int, int],
    *,
    queries: Sequence[int] | None = None,
    device: str = "cpu",
) -> list[Tensor]:
    """float32 q, k, v and dout, with ``PADDING`` rows after the last sequence."""
    rows = sum(lengths) + PADDING
    asked = rows if queries is None else sum(queries) + PADDING
    shapes = [(asked, sizes[0]), (rows, sizes[0]), (rows, sizes[1]), (asked, sizes[1])]
    return [torch.randn(n, heads, size).to(device) for n, size in shapes]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lengths: Sequence[int],
    *,
    backend: str,
    dtype: torch.dtype,
    queries: Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: int | None = 7,
    window: int | None = None,
) -> list[Tensor]:
    """``[out, dq, dk, dv]`` of a call in ``dtype``."""
    given = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    device = str(q.device)
    asked = {}
    if queries is not None:
        longest = max(queries, default=0)
        asked = {"cu_seqlens_query": offsets(queries, device), "max_length_query": longest}
    out = varlen_attention(
        *given,
        offsets(lengths, device),
        max_length=max(lengths, default=0),
        dropout=dropout,
        seed=None if seed is None else seed_of(seed, device),
        window=window,
        backend=backend,
        **asked,
    )
    return [out.detach(), *torch.autograd.grad(out, given, dout.to(dtype))]


def check_backend(
    backend: str,
    dtype: torch.dtype,
    lengths: Sequence[int],
    sizes: tuple[int, int],
    *,
    queries: Sequence[int] | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    heads: int = 3,
    device: str = "cpu",
) -> None:
    """Output and gradients are as good as the definition's, contiguous, and zero in the padding."""
    given = operands(lengths, heads, sizes, queries=queries, device=device)
    given = [x.to(dtype).float() for x in given]
    named = {"queries": queries, "dropout": dropout, "window": window}
    got, same, exact = (
        run(*given, lengths, backend=name, dtype=kind, **named)  # type: ignore[arg-type]
        for name, kind in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    for mine, theirs, true in zip(got, same, exact, strict=True):
        assert mine.is_contiguous()
        assert_close_to_reference(mine, theirs, true)
        assert not mine[-PADDING:].any()
