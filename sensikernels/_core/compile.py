"""Marks for ``torch.compile`` that cost no import of its compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_traced(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which would import dynamo here and now."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
