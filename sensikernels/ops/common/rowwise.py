"""The backends of operators over the rows of a matrix: the choice among them, their modules."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sensikernels._core import environment, extension
from sensikernels._core.checks import require_one_of
from sensikernels._core.compile import constant_when_traced
from sensikernels.ops.common.choice import Choice, choose

DTYPES = (torch.float32, torch.bfloat16)


def choice(x: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``x``, and why. Raises UsageError for a named one that cannot."""
    return _decide(x.device.type, x.dtype, backend)


def serving(x: Tensor, backend: str = "auto") -> str:
    """The name of the backend that serves ``x``, as ``choice``."""
    return _serving(x.device.type, x.dtype, backend)


@constant_when_traced
def _serving(device: str, dtype: torch.dtype, backend: str) -> str:
    return _decide(device, dtype, backend).backend


@cache
def _decide(device: str, dtype: torch.dtype, backend: str) -> Choice:
    refusals = {
        "native": native_refusal(device, dtype, "x"),
        "triton": _triton_refusal(device, dtype),
        "reference": None,
    }
    # The interpreter runs on a CPU where it is asked for, and nobody waits for it otherwise.
    prefer = ("native",) if device == "cpu" else ("native", "triton")
    return choose(refusals, backend, prefer=prefer, reason=f"the fastest for {device}")


def native_refusal(device: str, dtype: torch.dtype, name: str) -> str | None:
    """The reason why compiled kernels cannot serve the operand ``name``; None if they can."""
    if device != "cpu":
        return f"it runs on the CPU, {name} is on {device}"
    if dtype not in DTYPES:
        return f"it serves float32 and bfloat16, {name} is {dtype}"
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
    return serving(x, backend)


@cache
def kernels(operator: str, backend: str) -> ModuleType:
    """The module of an operator's folder that launches the kernels of ``backend``."""
    # By name: triton costs its import only where it runs.
    return import_module(f"sensikernels.ops.{operator}.{backend}")


def rows(x: Tensor) -> Tensor:
    """``x [..., width]`` as a contiguous matrix ``[rows, width]``."""
    x = x.contiguous()
    return x if x.dim() == 2 else x.view(x.shape[:-1].numel(), x.shape[-1])


def single(x: Tensor) -> Tensor:
    """``x`` in float32; no call of an operator where it is."""
    return x if x.dtype == torch.float32 else x.float()
