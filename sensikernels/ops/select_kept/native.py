"""Launchers of the compiled kernels."""

from __future__ import annotations

from functools import cache

import torch

from sensikernels import _native


@cache
def refusal(device: str) -> str | None:
    """Why the extension cannot serve tensors on ``device``; None if it can."""
    if not _native.available():
        return _native.why_not()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    name = "sensikernels_native::select_elements"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if key is None or not hasattr(_native.ops(), "select_elements") or not has(name, key):
        return f"the extension was built without a kernel for {device}"
    return None
