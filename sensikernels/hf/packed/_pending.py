"""Stand-ins in plain PyTorch for operators to come; each goes when its operator is there.

``geglu``, ``rotary``, and ``window`` of ``varlen_attention``: signatures and results are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.dropout import dropout as counter_dropout
from sensikernels.ops.varlen_attention import varlen_attention as unwindowed
from sensikernels.ops.varlen_attention.layout import pad, unpad


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(a) * b`` of the halves a and b of ``x [..., 2 n]``, plus ``bias``; ``[..., n]``."""
    a, b = (x if bias is None else x + bias).chunk(2, -1)
    return F.gelu(a) * b


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [tokens, heads, size]`` with its halves rotated by ``[tokens, size / 2]``, contiguous."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).chunk(2, -1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_length: int,
    window: int | None = None,
    **named: Any,
) -> Tensor:
    """``ops.varlen_attention`` of the pairs of a sequence at most ``window`` tokens apart."""
    if window is None or window >= max_length:
        return unwindowed(query, key, value, cu_seqlens, max_length=max_length, **named)
    given = named.get("cu_seqlens_query")
    cu_query = cu_seqlens if given is None else given
    length = max_length if given is None else named["max_length_query"]
    queries = pad(cu_query[:-1], cu_query[1:], length, len(query))
    keys = pad(cu_seqlens[:-1], cu_seqlens[1:], max_length, len(key))
    scores = queries.gather(query) @ keys.gather(key).transpose(2, 3) * named["scale"]
    places = torch.arange(max(length, max_length), device=query.device)
    far = (places[:length, None] - places[None, :max_length]).abs() > window
    outside = ~keys.inside[:, None, None, :] | far
    p = torch.softmax(scores.masked_fill(outside, torch.finfo(scores.dtype).min), -1)
    p = counter_dropout(p.masked_fill(outside, 0.0), named.get("dropout", 0.0))
    return unpad(p @ keys.gather(value), cu_query, len(query))
