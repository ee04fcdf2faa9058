"""The choice of a backend: the one that is named, or the first that can serve a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sensikernels._core import environment
from sensikernels._core.checks import require_one_of
from sensikernels._core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend and the reason for it.

    ``form`` is that of a linear: ``dense``, ``compact`` or ``block-sparse``.
    """

    backend: str
    reason: str
    form: str = ""

    def __str__(self) -> str:
        named = f"{self.form}, {self.backend}" if self.form else self.backend
        return f"{named} ({self.reason})"


def choose(
    refusals: Mapping[str, str | None],
    backend: str = "auto",
    *,
    prefer: Sequence[str] | None = None,
    reason: str = "the fastest that serves this call",
) -> Choice:
    """The backend that serves a call, and why.

    Args:
        refusals: why each backend of the operator cannot serve this call, None if it can, the
            fastest first; the last one always can.
        backend: a name among ``refusals``, or "auto". ``SENSIKERNELS_BACKEND`` stands in for
            "auto" where the operator has a backend of that name.
        prefer: the backends that "auto" may take, in this order; None: all of them.
        reason: why "auto" takes the first of them that can.

    Raises:
        UsageError: ``backend`` is unknown, or it was named and cannot serve this call.
    """
    if backend != "auto":
        require_one_of(backend, "backend", ("auto", *refusals))
    asked = environment.backend() if backend == "auto" else backend
    if asked in refusals:
        if refusals[asked] is not None:
            raise UsageError(f"backend: {asked} cannot serve this call: {refusals[asked]}")
        return Choice(backend=asked, reason="asked for by name")
    *fast, last = refusals
    for name in fast if prefer is None else prefer:
        if refusals[name] is None:
            return Choice(backend=name, reason=reason)
    whys = "; ".join(f"{name}: {why}" for name, why in refusals.items() if why)
    return Choice(backend=last, reason=whys or reason)
