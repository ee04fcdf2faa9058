"""Original GLUE files: tab-separated UTF-8, one header line, no quoting.

A ``"`` is a plain character and often unbalanced, so a line is only ever split at its tabs. A
byte-order mark (MRPC has one) and a carriage return before the line feed are dropped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sensikernels._core.errors import DataError
from sensikernels.data.labels import Coding
from sensikernels.data.tasks import Split, Task

log = logging.getLogger(__name__)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Rows of one split, in file order.

    ``texts_b`` is None for single sentences. ``labels`` is ``[rows]``, int64 classes or float32
    scores, or float32 ``[rows, names]`` of 0 and 1 for several labels a row; ``coding`` says what
    they were in the data, and is None where the task knows it.
    """

    texts_a: Sequence[str]
    texts_b: Sequence[str] | None
    labels: npt.NDArray[np.generic]
    coding: Coding | None = None

    def __len__(self) -> int:
        return len(self.texts_a)

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """These rows, in this order."""
        return Examples(
            texts_a=[self.texts_a[i] for i in rows],
            texts_b=None if self.texts_b is None else [self.texts_b[i] for i in rows],
            labels=self.labels[rows],
            coding=self.coding,
        )


def read_split(task: Task, data_dir: str | Path, split: Split) -> Examples:
    """One split from ``data_dir/<task folder>/``. Raises DataError naming the file and line."""
    return read(task, find(task, data_dir, split))


def find(task: Task, data_dir: str | Path, split: Split) -> Path:
    """The split's file. Raises DataError naming what is missing."""
    root, names = Path(data_dir), task.files(split)
    held = names[0] if task.folder is None else f"{task.folder}/"
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected the one that holds {held}")
    folder = root if task.folder is None else root / task.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {task.title} is read from {folder}/")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder / names[0]}: no such file" + "".join(f" (nor {n})" for n in names[1:])
    )


def read(task: Task, path: Path) -> Examples:
    """All rows of one file. Raises DataError naming the file and line."""
    rows = _rows(path)
    columns: Sequence[str]
    if task.columns is None:
        columns = next(rows, (1, []))[1]
    else:
        columns = task.columns
    wanted = (*task.texts, task.label)
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise DataError(f"{path}:1: header: expected columns {_list(wanted)}, got {_list(columns)}")
    *at_texts, at_label = (columns.index(name) for name in wanted)

    texts: tuple[list[str], ...] = tuple([] for _ in task.texts)
    labels: list[float] = []
    short: list[int] = []
    for number, fields in rows:
        if len(fields) < len(columns) and len(short) < task.short_rows:
            short.append(number)
            continue
        if len(fields) != len(columns):
            raise DataError(
                f"{path}:{number}: expected {len(columns)} tab-separated columns, got {len(fields)}"
            )
        labels.append(_label(task, fields[at_label], f"{path}:{number}"))
        for column, at in zip(texts, at_texts, strict=True):
            column.append(fields[at])
    if not labels:
        raise DataError(f"{path}: no rows")
    if short:
        log.warning("%s: truncated lines dropped: %s", path, ", ".join(map(str, short)))
    dtype = np.float32 if task.regression else np.int64
    pair = texts[1] if len(texts) == 2 else None
    return Examples(texts_a=texts[0], texts_b=pair, labels=np.asarray(labels, dtype=dtype))


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in text_lines(path))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a UTF-8 file, split at line feeds alone.

    Raises DataError naming the file, and the line that is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    lines = data.removeprefix(_BOM).split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start}") from error


def _label(task: Task, text: str, where: str) -> float:
    if task.label_range is None:
        if text in task.values:
            return task.values.index(text)
        raise DataError(
            f"{where}: {task.label}: expected one of {_list(task.values)}, got {text!r}"
        )
    low, high = task.label_range
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if low <= score <= high:
        return score
    raise DataError(f"{where}: {task.label}: expected a number in {low:g}..{high:g}, got {text!r}")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:16]) or "nothing"
    return shown if len(shown) <= 200 else shown[:197] + "..."
