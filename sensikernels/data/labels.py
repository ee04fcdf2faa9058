"""What labels of unknown data are: classes, scores, or several names a row; told from themselves.

Integers and strings are classes, in sorted order; a ``ClassLabel`` feature gives their names.
Floats are scores. Lists of names, and 0/1 vectors of one length, are several labels a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sensikernels._core.errors import DataError

Problem = Literal["classes", "scores", "several"]
_SHOWN = 8
_NUMBERS = (int, float)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How labels of the data become numbers.

    ``values[i]`` is what the data write for class ``i``, ``names[i]`` its name; scores have
    neither. ``vectors``: several labels a row are written as 0/1 vectors, else as lists of values.
    """

    problem: Problem
    values: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    vectors: bool = False

    def __str__(self) -> str:
        if self.problem == "scores":
            return "scores (regression)"
        names = ", ".join(self.names[:_SHOWN]) + (", …" if len(self.names) > _SHOWN else "")
        what = "classes" if self.problem == "classes" else "labels, several a row (multi-label)"
        return f"{len(self.names)} {what}: {names}"

    def encode(self, labels: Sequence[Any], where: Callable[[int], str]) -> npt.NDArray[Any]:
        """int64 ``[rows]``, float32 ``[rows]`` or float32 ``[rows, names]``.

        Raises DataError, at ``where(row)``, for a label that is not of this coding.
        """
        if self.problem == "scores":
            return np.asarray([_score(v, where(i)) for i, v in enumerate(labels)], np.float32)
        index = {_key(value): i for i, value in enumerate(self.values)}

        def find(value: Any, row: int) -> int:
            found = index.get(_key(value))
            if found is None:
                known = ", ".join(map(str, self.values[:_SHOWN]))
                more = f" … ({len(self.values)})" if len(self.values) > _SHOWN else ""
                raise DataError(f"{where(row)}: expected one of {known}{more}, got {value!r:.60}")
            return found

        if self.problem == "classes":
            return np.asarray([find(v, i) for i, v in enumerate(labels)], np.int64)
        several = np.zeros((len(labels), len(self.names)), np.float32)
        for row, held in enumerate(labels):
            if not isinstance(held, (list, tuple, np.ndarray)):
                raise DataError(f"{where(row)}: expected a list of labels, got {held!r:.60}")
            if not self.vectors:
                several[row, [find(value, row) for value in held]] = 1
                continue
            if len(held) != len(self.names) or not _is_vector(held):
                wanted = f"a vector of {len(self.names)} zeros and ones"
                raise DataError(f"{where(row)}: expected {wanted}, got {list(held)!r:.60}")
            several[row] = held
        return several


def infer(
    labels: Sequence[Any], where: Callable[[int], str], names: Sequence[str] | None = None
) -> Coding:
    """The coding of these labels; ``names`` are those of a ``ClassLabel`` feature.

    Raises DataError, at ``where(row)``, for a row without a label, labels of mixed kinds, or no
    two different ones.
    """
    lists = bool(labels) and isinstance(labels[0], (list, tuple, np.ndarray))
    if names is not None:
        known = tuple(range(len(names)))
        problem: Problem = "several" if lists else "classes"
        return Coding(problem=problem, values=known, names=tuple(names))
    if lists:
        return _several(labels, where)
    for row, value in enumerate(labels):
        missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
        if missing or not isinstance(value, (str, bool, *_NUMBERS)):
            raise DataError(f"{where(row)}: expected a label, got {value!r:.60}")
    _same_kind(labels, where)
    if any(type(value) is float for value in labels):
        return Coding(problem="scores")
    values = tuple(sorted(set(labels)))
    if len(values) < 2:
        raise DataError(f"{where(0)}: expected at least two classes, got {_list(values)} alone")
    return Coding(problem="classes", values=values, names=tuple(map(str, values)))


def of_array(labels: npt.NDArray[Any], where: Callable[[int], str]) -> Coding:
    """The coding of labels that are numbers already: int64 classes, float32 scores or vectors."""
    if labels.ndim == 2:
        return infer(labels.tolist(), where)
    if labels.dtype.kind == "f":
        return Coding(problem="scores")
    low, count = int(labels.min(initial=0)), int(labels.max(initial=0)) + 1
    if low < 0 or count < 2:
        raise DataError(f"{where(0)}: expected classes 0, 1, …, got {low} to {count - 1}")
    values = tuple(range(count))
    return Coding(problem="classes", values=values, names=tuple(map(str, values)))


def _several(labels: Sequence[Any], where: Callable[[int], str]) -> Coding:
    for row, held in enumerate(labels):
        if not isinstance(held, (list, tuple, np.ndarray)):
            raise DataError(f"{where(row)}: expected a list of labels, got {held!r:.60}")
    flat = [value for held in labels for value in held]
    if flat and all(isinstance(value, str) for value in flat):
        values = tuple(sorted(set(flat)))
        return Coding(problem="several", values=values, names=values)
    width = len(labels[0])
    for row, held in enumerate(labels):
        if len(held) != width or not width or not _is_vector(held):
            raise DataError(
                f"{where(row)}: expected lists of names, or 0/1 vectors of one length, "
                f"got {list(held)!r:.60}"
            )
    values = tuple(range(width))
    return Coding(problem="several", values=values, names=tuple(map(str, values)), vectors=True)


def _same_kind(labels: Sequence[Any], where: Callable[[int], str]) -> None:
    """All strings, all booleans, or all numbers."""

    def kind(value: Any) -> str:
        plain = "a string" if isinstance(value, str) else "a number"
        return "a boolean" if isinstance(value, bool) else plain

    first = kind(labels[0]) if labels else ""
    for row, value in enumerate(labels):
        if kind(value) != first:
            raise DataError(
                f"{where(row)}: expected {first} as in the first row, got {value!r:.60}"
            )


def _key(value: Any) -> tuple[str, Any]:
    """A dictionary's key: 1, 1.0 and True are equal, and not the same label."""
    return type(value).__name__, value if isinstance(value, (str, int, float)) else repr(value)


def _is_vector(held: Iterable[Any]) -> bool:
    return all(not isinstance(value, str) and value in (0, 1) for value in held)


def _score(value: Any, where: str) -> float:
    plain = isinstance(value, _NUMBERS) and not isinstance(value, bool)
    if not plain or not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, got {value!r:.60}")
    return float(value)


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
