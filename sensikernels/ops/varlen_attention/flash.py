"""PyTorch's own variable-length FlashAttention-2 kernels (Dao, 2023) on CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.varlen_attention.reference import DRAWS

LARGEST = 256
_ATEN = torch.ops.aten


def refusal(device: torch.device, dtype: torch.dtype, size: int, *, seeded: bool) -> str | None:
    """Why the kernel cannot serve such tensors; None if it can."""
    if device.type != "cuda":
        return f"it runs on CUDA, query is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it serves float16 and bfloat16, query is {dtype}"
    if size > LARGEST:
        return f"it serves head sizes up to {LARGEST}, got {size}"
    if seeded:
        return "it draws dropout from torch's generator, seed was given"
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no CUDA FlashAttention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    max_query: int,
    max_key: int,
    threshold: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, logsumexp [heads, tokens_q], rng_state)``."""
    vo_size = value.shape[2]
    if not (query.numel() and key.numel() and value.numel() and max_query and max_key):
        lse = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return query.new_zeros(*query.shape[:2], vo_size), lse, state
    q, k, v = _equal_sizes(query, key, value)
    out, lse, state, _, _ = _ATEN._flash_attention_forward(
        q, k, v, cu_query, cu_key, max_query, max_key, _rate(threshold), False, False, scale=scale
    )
    return _finished(out, cu_query, vo_size), lse, state


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    max_query: int,
    max_key: int,
    threshold: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    if not (query.numel() and key.numel() and value.numel() and max_query and max_key):
        dq, dk, dv = (x.new_zeros(x.shape) for x in (query, key, value))
        return dq, dk, dv
    q, k, v, d, o = _equal_sizes(query, key, value, dout, out)
    unused = torch.empty((), dtype=state.dtype, device=state.device)
    dq, dk, dv = _ATEN._flash_attention_backward(
        *(d, q, k, v, o, lse, cu_query, cu_key, max_query, max_key),
        *(_rate(threshold), False, state, unused),
        scale=scale,
    )
    return (
        _finished(dq, cu_query, query.shape[2]),
        _finished(dk, cu_key, key.shape[2]),
        _finished(dv, cu_key, value.shape[2]),
    )


def _rate(threshold: int) -> float:
    return 1.0 - threshold / DRAWS


def _equal_sizes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Head sizes padded with zeros to the largest one's next multiple of 8."""
    size = -(-max(x.shape[2] for x in tensors) // 8) * 8
    return tuple(x if x.shape[2] == size else F.pad(x, (0, size - x.shape[2])) for x in tensors)


def _finished(x: Tensor, cu_seqlens: Tensor, size: int) -> Tensor:
    """Contiguous at its own size; the kernel leaves rows after the last sequence unwritten."""
    x = x[..., :size].contiguous()
    padding = torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
    return x.masked_fill_(padding[:, None, None], 0.0)
