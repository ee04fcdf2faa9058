"""PyTorch's own variable-length FlashAttention-2 kernels (Dao, 2023) on CUDA."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.philox import DRAWS
from sensikernels.ops.varlen_attention.call import Call

LARGEST = 256
_ATEN = torch.ops.aten


def refusal(
    device: torch.device, dtype: torch.dtype, size: int, *, seeded: bool, apart: bool
) -> str | None:
    """The reason why the kernel cannot serve such tensors; None if it can."""
    if device.type != "cuda":
        return f"it runs on CUDA, query is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it serves float16 and bfloat16, query is {dtype}"
    if size > LARGEST:
        return f"it serves head sizes up to {LARGEST}, got {size}"
    if seeded:
        return "it draws dropout from torch's generator, seed was given"
    if apart:
        return "it counts a window from the sequences' ends, queries are counted apart"
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no CUDA FlashAttention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


class Saved(NamedTuple):
    """The tensors of the forward that backward reads beside the call."""

    out: Tensor
    logsumexp: Tensor
    rng_state: Tensor


def forward(call: Call) -> Saved:
    """``out [tokens_q, heads, vo_size]``, ``logsumexp [heads, tokens_q]``, rng state."""
    query, vo_size = call.query, call.value.shape[2]
    if call.nothing:
        lse = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return Saved(query.new_zeros(*query.shape[:2], vo_size), lse, state)
    q, k, v = _equal_sizes(*call[:3])
    out, lse, state, _, _ = _ATEN._flash_attention_forward(
        *(q, k, v, *_places(call), _rate(call.threshold), False, False),
        scale=call.scale,
        **_window(call),
    )
    return Saved(_finished(out, call.cu_query, vo_size), lse, state)


def backward(dout: Tensor, saved: Saved, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    if call.nothing:
        dq, dk, dv = (x.new_zeros(x.shape) for x in call[:3])
        return dq, dk, dv
    out, lse, state = saved
    q, k, v, d, o = _equal_sizes(*call[:3], dout, out)
    unused = torch.empty((), dtype=state.dtype, device=state.device)
    dq, dk, dv = _ATEN._flash_attention_backward(
        *(d, q, k, v, o, lse, *_places(call), _rate(call.threshold), False, state, unused),
        scale=call.scale,
        **_window(call),
    )
    return (
        _finished(dq, call.cu_query, call.query.shape[2]),
        _finished(dk, call.cu_key, call.key.shape[2]),
        _finished(dv, call.cu_key, call.value.shape[2]),
    )


def _places(call: Call) -> tuple[Tensor, Tensor, int, int]:
    return call.cu_query, call.cu_key, call.max_query, call.max_key


def _window(call: Call) -> dict[str, int]:
    """To both sides, inclusive; beyond the longest sequence there is nothing."""
    if call.window is None:
        return {}
    window = min(call.window, call.max_key)
    return {"window_size_left": window, "window_size_right": window}


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
