"""The only place that reads the environment."""

from __future__ import annotations

import os
from typing import Final

from sensikernels._core.checks import require, require_one_of

BACKENDS: Final = ("auto", "reference", "native", "triton")
# Read once: every call of an operator asks for it.
_BACKEND: Final = os.environ.get("SENSIKERNELS_BACKEND", "auto")
_CHECK: Final = os.environ.get("SENSIKERNELS_CHECK", "0")


def backend() -> str:
    """``SENSIKERNELS_BACKEND``: what ``backend="auto"`` stands for (default ``auto``)."""
    if _BACKEND not in BACKENDS:
        require_one_of(_BACKEND, "SENSIKERNELS_BACKEND", BACKENDS)
    return _BACKEND


def checks_values() -> bool:
    """``SENSIKERNELS_CHECK=1``: indices on a device are checked too, which waits for it."""
    if _CHECK not in ("0", "1"):
        require_one_of(_CHECK, "SENSIKERNELS_CHECK", ("0", "1"))
    return _CHECK == "1"


def log_level() -> str:
    """``SENSIKERNELS_LOG``: a ``logging`` level name (default ``WARNING``)."""
    return os.environ.get("SENSIKERNELS_LOG", "WARNING").upper()


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def rank() -> int:
    """``RANK``, which torchrun sets: this process among those of a run; 0 is the first."""
    return _whole("RANK", 0)


def world_size() -> int:
    """``WORLD_SIZE``, which torchrun sets: how many processes were started; 1 without it."""
    return _whole("WORLD_SIZE", 1)


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    require(text.isdecimal() and len(text) < 10, name, "a whole number", repr(text))
    return int(text)


def reserve_primitive_cache(entries: int) -> None:
    """Let oneDNN keep ``entries`` compiled shapes; a value the user set stays.

    oneDNN reads the variable at its first product, so this must come before it.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(entries))


def quiet_profiler() -> None:
    """Keep torch's profiler from writing its own log lines to stderr; a user's level stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
