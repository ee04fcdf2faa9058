"""The compiled extension: loaded when first asked for, and never required."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sensikernels._core.errors import SensiError

_LIBRARY = Path(__file__).parents[1] / "libsensikernels.so"
_MISSING = Path(__file__).parents[1] / "_native_missing.txt"


@cache
def why_not() -> str | None:
    """The reason why the extension cannot be used, on one line; None if it can. Loads it."""
    if not _LIBRARY.exists():
        return (
            f"no compiled extension ({_note() or 'it was not built'}); "
            "`SENSIKERNELS_BUILD=cpu pip install --no-build-isolation .` builds it"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load beside torch {torch.__version__}: {error}"
    return None


@cache
def available() -> bool:
    """True if the extension is loaded. The first refusal is logged, with its reason."""
    reason = why_not()
    if reason is not None:
        logging.getLogger("sensikernels").warning("slower path: %s", reason)
    return reason is None


def ops() -> Any:
    """``torch.ops.sensikernels_native``, the raw launchers.

    Raises:
        SensiError: the extension cannot be used, with the reason of :func:`why_not`.
    """
    reason = why_not()
    if reason is not None:
        raise SensiError(f"native backend: {reason}")
    return torch.ops.sensikernels_native


def why_no_cuda() -> str | None:
    """The reason why the extension holds no CUDA kernels, on one line; None if it does.

    Raises:
        SensiError: there is no extension.
    """
    if build_info()["cuda_archs"]:
        return None
    return f"built without CUDA kernels ({_note() or 'no note says why'})"


def describe() -> str:
    """This build on one line: pure Python and why, or the devices it holds kernels for."""
    reason = why_not()
    if reason is not None:
        return reason if _LIBRARY.exists() else f"pure Python, {reason}"
    info = build_info()
    made = f"{info['compiler']}, torch {info['torch']}"
    if info["cuda_archs"]:
        archs = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"].split())
        return f"native, CPU and CUDA kernels for {archs} ({made})"
    return f"native, CPU kernels ({made}); {why_no_cuda()}"


def _note() -> str:
    """The build's own note of parts it left out; empty if there is none."""
    return _MISSING.read_text().splitlines()[0] if _MISSING.exists() else ""


def build_info() -> dict[str, str]:
    """The build: ``torch``, ``stable_abi``, ``compiler`` and ``cuda_archs`` ("" for none)."""
    info: dict[str, str] = json.loads(ops().build_info())
    return info
