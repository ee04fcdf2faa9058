"""The only place that reads the environment."""

from __future__ import annotations

import os
from typing import Final

from sensikernels._checks import require_one_of

BACKENDS: Final = ("auto", "reference", "native", "triton")
# Read once: every call of an operator asks for it.
_BACKEND: Final = os.environ.get("SENSIKERNELS_BACKEND", "auto")


def backend() -> str:
    """``SENSIKERNELS_BACKEND``: what ``backend="auto"`` stands for (default ``auto``)."""
    if _BACKEND not in BACKENDS:
        require_one_of(_BACKEND, "SENSIKERNELS_BACKEND", BACKENDS)
    return _BACKEND


def log_level() -> str:
    """``SENSIKERNELS_LOG``: a ``logging`` level name (default ``WARNING``)."""
    return os.environ.get("SENSIKERNELS_LOG", "WARNING").upper()


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def rank() -> int:
    """``RANK``, which torchrun sets: this process among those of a run; 0 is the first."""
    return int(os.environ.get("RANK", "0"))


def reserve_primitive_cache(entries: int) -> None:
    """Let oneDNN keep ``entries`` compiled shapes; a value the user set stays.

    oneDNN reads the variable at its first product, so this must come before it.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(entries))


def quiet_profiler() -> None:
    """Keep torch's profiler from writing its own log lines to stderr; a user's level stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
