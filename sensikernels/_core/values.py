"""Checks of the values of index tensors, made wherever reading them waits for nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sensikernels._core import environment, extension
from sensikernels._core.checks import expected

_PLAIN = (Tensor, torch.nn.Parameter)


def readable(t: Tensor) -> bool:
    """True if the values of ``t`` may be read now.

    On a CPU always; on a device, which has to be waited for, if ``SENSIKERNELS_CHECK=1``. Never
    while a graph is traced or captured, nor where there are no values.
    """
    if type(t) not in _PLAIN or torch.compiler.is_compiling():
        return False
    if t.is_cpu:
        return True
    waits = environment.checks_values() and not t.is_meta
    return waits and not torch.cuda.is_current_stream_capturing()


def require_within(
    index: Tensor,
    name: str,
    count: int,
    *,
    low: int = 0,
    ascending: bool = False,
    what: str = "indices",
) -> None:
    """Raise UsageError unless all entries lie in ``[low, count)``, if ``index`` is readable.

    ``ascending``: each of ``index [n]`` must also be above the one before it. ``what`` they are
    called in the message.
    """
    if not readable(index):
        return
    at = _first_outside(index, low, count, ascending)
    if at >= 0:
        wanted = f"{'ascending ' * ascending}{what} in [{low}, {count})"
        raise expected(name, wanted, f"{what} with {int(index.flatten()[at])} at {at}")


@cache
def _compiled() -> Any:
    return extension.ops().first_outside.default._op if extension.available() else None


def _first_outside(index: Tensor, low: int, high: int, ascending: bool) -> int:
    """The first place that is wrong, -1 if none is."""
    find = _compiled()
    if find is not None and index.is_cpu and index.dtype in (torch.int32, torch.int64):
        at: int = find(index.contiguous(), low, high, ascending)
        return at
    flat = index.flatten()
    wrong = (flat < low) | (flat >= high)
    if ascending:
        wrong[1:] |= flat[1:] <= flat[:-1]
    return int(wrong.int().argmax()) if wrong.any() else -1
