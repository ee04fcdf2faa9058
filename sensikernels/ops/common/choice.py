"""Which backend serves an operator whose compiled kernels take float32 and bfloat16 on a CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sensikernels._core import environment, extension
from sensikernels._core.checks import require_one_of
from sensikernels._core.compile import constant_when_traced
from sensikernels._core.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16)


def choose(x: Tensor, backend: str = "auto") -> tuple[str, str]:
    """The backend that serves ``x`` and why. Raises UsageError for a named one that cannot."""
    if backend not in environment.BACKENDS:
        require_one_of(backend, "backend", environment.BACKENDS)
    asked = environment.backend() if backend == "auto" else backend
    return _choose(x.device.type, x.dtype, asked)


@constant_when_traced
def _choose(device: str, dtype: torch.dtype, asked: str) -> tuple[str, str]:
    return _decide(device, dtype, asked)


@cache
def _decide(device: str, dtype: torch.dtype, asked: str) -> tuple[str, str]:
    refusals = {
        "reference": None,
        "native": _native_refusal(device, dtype),
        "triton": _triton_refusal(device, dtype),
    }
    if asked != "auto":
        if refusals[asked]:
            raise UsageError(f"backend: {asked} cannot serve this call: {refusals[asked]}")
        return asked, "asked for by name"
    for name in ("native", "triton"):
        if refusals[name] is None and not (name == "triton" and device == "cpu"):
            return name, f"the fastest for {device}"
    return "reference", "; ".join(f"{name}: {why}" for name, why in refusals.items() if why)


def _native_refusal(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"it runs on the CPU, x is on {device}"
    if dtype not in DTYPES:
        return f"it serves float32 and bfloat16, x is {dtype}"
    return None if extension.available() else extension.why_not()


def _triton_refusal(device: str, dtype: torch.dtype) -> str | None:
    if device == "cpu" and not environment.interpreting():
        return "x is on the CPU"
    return None if dtype != torch.float64 else "it serves 16 and 32 bit floats"


def resolve(x: Tensor, backend: str) -> str:
    """The backend an operator runs for ``x``; on meta tensors nothing runs, a name is enough."""
    if x.is_meta:
        require_one_of(backend, "backend", environment.BACKENDS)
        return backend
    return choose(x, backend)[0]


def rows(x: Tensor) -> Tensor:
    """``x`` as a contiguous matrix ``[rows, width]``."""
    return x.contiguous().view(x.shape[:-1].numel(), x.shape[-1])


def described(x: Tensor) -> str:
    """``dtype [shape] on device``, for messages."""
    return f"{x.dtype} {list(x.shape)} on {x.device}"
