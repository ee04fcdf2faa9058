"""Which kernel serves a call, and why."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import require_one_of
from sensikernels._core.compile import constant_when_traced
from sensikernels._core.errors import UsageError
from sensikernels.ops.varlen_attention import flash, native

BACKENDS = ("auto", "reference", "native", "flash", "buckets")
KERNELS = ("native", "flash", "buckets")
"""What the operators take: the reference is plain PyTorch, without one."""


def choose(
    query: Tensor,
    value: Tensor,
    backend: str = "auto",
    *,
    seeded: bool = False,
) -> tuple[str, str]:
    """The backend that serves such tensors and why; ``seeded``: dropout with a given seed.

    Raises UsageError for a named one that cannot.
    """
    require_one_of(backend, "backend", BACKENDS)
    size = max(int(query.shape[2]), int(value.shape[2]))
    return _choose(str(query.device), query.dtype, size, seeded, backend)


@constant_when_traced
def _choose(
    device: str, dtype: torch.dtype, size: int, seeded: bool, backend: str
) -> tuple[str, str]:
    return _chosen(device, dtype, size, seeded, backend)


@cache
def _chosen(
    device: str, dtype: torch.dtype, size: int, seeded: bool, backend: str
) -> tuple[str, str]:
    asked = environment.backend() if backend == "auto" else backend
    where = torch.device(device)
    refusals = {
        "reference": None,
        "buckets": None,
        "native": native.refusal(where.type, dtype),
        "flash": flash.refusal(where, dtype, size, seeded=seeded),
    }
    # There is no Triton kernel here: the variable leaves the choice to auto.
    if asked not in ("auto", "triton"):
        if refusals[asked]:
            raise UsageError(f"backend: {asked} cannot serve this call: {refusals[asked]}")
        return asked, "asked for by name"
    for name in ("native", "flash"):
        if refusals[name] is None:
            return name, f"the fastest for {where.type}"
    return "buckets", "; ".join(f"{name}: {why}" for name, why in refusals.items() if why)


def check_kernels(query: Tensor, value: Tensor, backend: str) -> None:
    """Raise UsageError unless ``backend`` names kernels that serve these tensors."""
    if backend not in KERNELS:
        require_one_of(backend, "backend", KERNELS)
    if not query.is_meta:
        choose(query, value, backend)
