"""Operators over lists of tensors of mixed dtypes: which kernel of each kind serves them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sensikernels._core import environment, extension
from sensikernels.ops.common.choice import Choice, choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels mix; anything else is served by the reference."""


@cache
def native_refusal(kernel: str, device: str) -> str | None:
    """The reason for which the extension cannot run ``kernel`` on ``device``; None if it can."""
    if not extension.available():
        return extension.why_not()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = f"sensikernels_native::{kernel}"
    if key is None or not hasattr(extension.ops(), kernel) or not has(name, key):
        return f"the extension was built without a kernel of {kernel} for {device}"
    return None


def triton_refusal(device: str) -> str | None:
    """The reason for which Triton kernels cannot run on ``device``; None if they can."""
    if device == "cuda" or environment.interpreting():
        return None
    return f"Triton runs on CUDA tensors, not on {device}"


def choice(kernel: str, tensors: Sequence[Tensor], backend: str) -> Choice:
    """The backend that runs ``kernel`` over ``tensors``, all on one device, and why.

    Raises:
        UsageError: an unknown backend, or one named that cannot serve them.
    """
    device = tensors[0].device.type if tensors else "cpu"
    dtypes = {t.dtype for t in tensors}.difference(DTYPES)
    return _decide(kernel, device, next(iter(dtypes)) if dtypes else None, backend)


@cache
def _decide(kernel: str, device: str, dtype: torch.dtype | None, backend: str) -> Choice:
    """``dtype``: one that the kernels do not serve, if there is any."""
    other = None if dtype is None else f"{dtype} is served by the reference only"
    refusals = {
        "native": other or native_refusal(kernel, device),
        "triton": other or triton_refusal(device),
        "reference": None,
    }
    # The interpreter runs on a CPU where it is asked for by name.
    prefer = ("native",) if device == "cpu" else ("native", "triton")
    reason = f"the fastest that serves {device} tensors"
    return choose(refusals, backend, prefer=prefer, reason=reason)
