"""The PEP 517 backend: setuptools', and torch where a native build is due and none is at hand.

An isolated build compiles against the torch of the environment it is made for. Only where that has
none is one fetched for the build, the same that the package itself needs.
"""

from __future__ import annotations

import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import build_native
from build_native import BuildError

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_needed()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_needed()]


def torch_needed() -> list[str]:
    """A requirement on torch, if there is something to compile and nothing to compile against."""
    if build_native.MODE == "none" or sys.platform != "linux":
        return []
    try:
        build_native.find_cxx()
    except BuildError:
        return []  # nothing can be compiled; the build itself says so
    try:
        build_native.find_torch()
    except BuildError:
        return ["torch>=2.10"]
    return []
