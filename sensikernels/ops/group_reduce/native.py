"""Launcher of the compiled kernels."""

from __future__ import annotations

from typing import Any

from sensikernels._core import extension


def group_reduce(*arguments: Any) -> None:
    """Two launches, with the arguments of ``triton.group_reduce``.

    The first makes partial sums of the chunks, the second makes groups of them and updates
    ``running`` and ``ema``.
    """
    extension.ops().group_reduce(*arguments)
