"""Launchers of the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.columns import launcher
from sensikernels.ops.varlen_attention.call import Call

PAIRS = True
"""Multiply in bfloat16 where the processor can (AVX512_BF16); elsewhere it is widened."""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)``."""
    query = call.query
    out = query.new_empty(*query.shape[:2], call.value.shape[2])
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    launcher("varlen_attention")(*call[:6], *call[8:], PAIRS, out, lse)
    return out, lse


def backward(dout: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``, contiguous."""
    dq, dk, dv = (x.new_empty(x.shape) for x in call[:3])
    launcher("varlen_attention_backward")(dout, *call[:6], *call[8:], PAIRS, dq, dk, dv)
    return dq, dk, dv
