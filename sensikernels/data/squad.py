"""SQuAD's JSON, v1.1 and v2.0, in the original nesting: articles, paragraphs, questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sensikernels._core.errors import DataError
from sensikernels._core.files import one_line, read_json


class Question(NamedTuple):
    """One question; ``answers`` are (start, text), the start in characters of ``context``.

    Without answers it is one that the context does not answer.
    """

    id: str
    text: str
    context: str
    answers: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Questions in file order. ``nulls``: the file has unanswerable ones, as v2 does."""

    items: Sequence[Question]
    path: Path
    nulls: bool

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: npt.NDArray[np.int64]) -> Questions:
        """These questions, in this order."""
        return Questions(items=[self.items[i] for i in rows], path=self.path, nulls=self.nulls)


def read_questions(path: Path) -> Questions:
    """All questions of one file. Raises DataError naming the file, the place or question in it."""
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON that can be read: {one_line(error)}") from error
    items: list[Question] = []
    seen: set[str] = set()
    for question in _questions(path, content):
        if question.id in seen:
            raise DataError(f"{path}: question {question.id}: expected an id of its own, got two")
        seen.add(question.id)
        items.append(question)
    if not items:
        raise DataError(f"{path}: no questions")
    return Questions(items=items, path=path, nulls=any(not q.answers for q in items))


def _questions(path: Path, content: Any) -> Iterator[Question]:
    for a, article in enumerate(_field(content, "data", list, f"{path}")):
        where = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_field(article, "paragraphs", list, where)):
            there = f"{where}.paragraphs[{p}]"
            context = _field(paragraph, "context", str, there)
            for q, item in enumerate(_field(paragraph, "qas", list, there)):
                yield _question(path, item, context, f"{there}.qas[{q}]")


def _question(path: Path, item: Any, context: str, there: str) -> Question:
    name = _field(item, "id", str, there)
    where = f"{path}: question {name}"
    impossible = item.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{where}: is_impossible: expected true or false, got {impossible!r:.40}")
    answers = []
    for one in _field(item, "answers", list, where):
        start = _field(one, "answer_start", int, f"{where}: answers")
        text = _field(one, "text", str, f"{where}: answers")
        found = context[start : start + len(text)] if start >= 0 else ""
        if not text or found != text:
            raise DataError(
                f"{where}: answers: expected {text!r:.60} at character {start} of the context, "
                f"got {found!r:.60}"
            )
        answers.append((start, text))
    if impossible and answers:
        raise DataError(f"{where}: expected no answers, as is_impossible says, got {len(answers)}")
    if "is_impossible" in item and not impossible and not answers:
        raise DataError(f"{where}: expected answers, as is_impossible is false, got none")
    return Question(name, _field(item, "question", str, where), context, tuple(answers))


def _field(item: Any, name: str, kind: type, where: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        what = {list: "a list", str: "a string", int: "a whole number"}[kind]
        got = "none" if value is None else f"{value!r:.40}"
        raise DataError(f"{where}: {name}: expected {what}, got {got}")
    return value
