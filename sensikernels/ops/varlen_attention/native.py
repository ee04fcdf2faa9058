"""Launchers of the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels.ops.common.columns import launcher

DTYPES = (torch.float32, torch.bfloat16)
PAIRS = True
"""Multiply in bfloat16 where the processor can (AVX512_BF16); elsewhere it is widened."""


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why the compiled kernel cannot serve such tensors; None if it can."""
    if device != "cpu":
        return f"it runs on the CPU, query is on {device}"
    if dtype not in DTYPES:
        return f"it serves float32 and bfloat16, query is {dtype}"
    return None if extension.available() else extension.why_not()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    seed: Tensor,
    threshold: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)``; operands with a unit last stride."""
    out = query.new_empty(*query.shape[:2], value.shape[2])
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    arguments = (query, key, value, cu_query, cu_key, seed, threshold, scale, PAIRS)
    launcher("varlen_attention")(*arguments, out, lse)
    return out, lse


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    seed: Tensor,
    threshold: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``, contiguous."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    arguments = (dout, query, key, value, cu_query, cu_key, seed, threshold, scale, PAIRS)
    launcher("varlen_attention_backward")(*arguments, dq, dk, dv)
    return dq, dk, dv
