"""Argument checks: one message form, raised before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable

from sensikernels._core.errors import UsageError


def require(ok: bool, argument: str, expected: object, got: object) -> None:
    """Raise ``UsageError("argument: expected …, got …")`` unless ``ok``."""
    if not ok:
        raise UsageError(f"{argument}: expected {expected}, got {got}")


def require_one_of(value: str, argument: str, known: Iterable[str]) -> None:
    """Raise ``UsageError`` listing the known names unless ``value`` is one of them."""
    names = sorted(known)
    require(value in names, argument, "one of " + ", ".join(names), repr(value))
