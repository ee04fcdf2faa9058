"""Checks of arguments: one form of message, raised before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable

from sensikernels._core.errors import UsageError


def expected(argument: str, wanted: object, got: object) -> UsageError:
    """The error to raise for a wrong argument: ``argument: expected …, got …``."""
    return UsageError(f"{argument}: expected {wanted}, got {got}")


def require(ok: bool, argument: str, wanted: object, got: object) -> None:
    """Raise ``expected(argument, wanted, got)`` unless ``ok``.

    The message is formed whether it is needed or not: where a call of an operator must cost
    little, write ``if wrong: raise expected(…)``.
    """
    if not ok:
        raise expected(argument, wanted, got)


def require_one_of(value: str, argument: str, known: Iterable[str]) -> None:
    """Raise ``UsageError`` listing the known names unless ``value`` is one of them."""
    names = sorted(known)
    require(value in names, argument, "one of " + ", ".join(names), repr(value))
