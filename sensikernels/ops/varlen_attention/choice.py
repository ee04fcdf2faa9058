"""The choice among the kernels that serve a call."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sensikernels._core.checks import require_one_of
from sensikernels._core.compile import constant_when_traced
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.common.rowwise import native_refusal
from sensikernels.ops.varlen_attention import flash

KERNELS = ("native", "flash", "buckets")
"""The backends that the operators take: the reference is plain PyTorch, without an operator."""


def choice(
    query: Tensor,
    value: Tensor,
    backend: str = "auto",
    *,
    seeded: bool = False,
    apart: bool = False,
) -> Choice:
    """The backend that serves such tensors, and why; UsageError for a named one that cannot.

    ``seeded``: dropout with a given seed; ``apart``: a window over queries counted apart.
    """
    return _decide(str(query.device), query.dtype, _size(query, value), seeded, apart, backend)


def serving(
    query: Tensor,
    value: Tensor,
    backend: str = "auto",
    *,
    seeded: bool = False,
    apart: bool = False,
) -> str:
    """The name of the backend that serves such tensors, as ``choice``."""
    return _serving(str(query.device), query.dtype, _size(query, value), seeded, apart, backend)


def check_kernels(query: Tensor, value: Tensor, backend: str, *, apart: bool) -> None:
    """Raise UsageError unless ``backend`` names kernels that serve these tensors."""
    if backend not in KERNELS:
        require_one_of(backend, "backend", KERNELS)
    if not query.is_meta:
        serving(query, value, backend, apart=apart)


def _size(query: Tensor, value: Tensor) -> int:
    return max(int(query.shape[2]), int(value.shape[2]))


@constant_when_traced
def _serving(
    device: str, dtype: torch.dtype, size: int, seeded: bool, apart: bool, backend: str
) -> str:
    return _decide(device, dtype, size, seeded, apart, backend).backend


@cache
def _decide(
    device: str, dtype: torch.dtype, size: int, seeded: bool, apart: bool, backend: str
) -> Choice:
    where = torch.device(device)
    # There is no Triton kernel here: SENSIKERNELS_BACKEND=triton leaves the choice to auto.
    refusals = {
        "reference": None,
        "native": native_refusal(where.type, dtype, "query"),
        "flash": flash.refusal(where, dtype, size, seeded=seeded, apart=apart),
        "buckets": None,
    }
    reason = f"the fastest for {where.type}"
    return choose(refusals, backend, prefer=("native", "flash"), reason=reason)
