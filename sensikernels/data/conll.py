"""Two-column CoNLL: a word and its tag a line, parted by a tab or spaces; blank lines part
sentences. Lines that begin with ``-DOCSTART-`` part documents and are no words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sensikernels._core.errors import DataError
from sensikernels.data.tsv import text_lines

OUTSIDE = "O"
_BLANK = " \t\r\v\f"
_START = "-DOCSTART-"


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """Sentences as words and their tags, in file order; ``lines[i]``: the first word's line."""

    words: Sequence[Sequence[str]]
    tags: Sequence[Sequence[str]]
    lines: Sequence[int]
    path: Path

    def __len__(self) -> int:
        return len(self.words)

    def take(self, rows: npt.NDArray[np.int64]) -> Words:
        """These sentences, in this order."""
        return Words(
            words=[self.words[i] for i in rows],
            tags=[self.tags[i] for i in rows],
            lines=[self.lines[i] for i in rows],
            path=self.path,
        )


def read_words(path: Path) -> Words:
    """All sentences of one file. Raises DataError naming the file and line."""
    words: list[list[str]] = []
    tags: list[list[str]] = []
    lines: list[int] = []
    inside = False
    for number, line in text_lines(path):
        if not line.strip() or line.startswith(_START):
            inside = False
            continue
        word, tag = _columns(line, f"{path}:{number}")
        if not inside:
            words.append([])
            tags.append([])
            lines.append(number)
        inside = True
        words[-1].append(word)
        tags[-1].append(tag)
    if not words:
        raise DataError(f"{path}: no words")
    return Words(words=words, tags=tags, lines=lines, path=path)


def tag_set(train: Words) -> tuple[str, ...]:
    """The tags of the training file: ``O`` first, then sorted. Raises DataError: no other."""
    found = sorted({tag for row in train.tags for tag in row} - {OUTSIDE})
    if not found:
        raise DataError(f"{train.path}: expected tags of entities, got {OUTSIDE} alone")
    return (OUTSIDE, *found)


def check_tags(dev: Words, known: Sequence[str]) -> None:
    """Raise DataError naming the line of the first tag that is not known."""
    names = set(known)
    for row, tags in enumerate(dev.tags):
        for place, tag in enumerate(tags):
            if tag not in names:
                raise DataError(
                    f"{dev.path}:{dev.lines[row] + place}: tag: expected one of the training "
                    f"file's, {', '.join(known)}, got {tag!r}"
                )


def _columns(line: str, where: str) -> tuple[str, str]:
    text = line.rstrip(_BLANK)
    parts = text.split("\t") if "\t" in text else re.split(" +", text.lstrip(" "))
    parts = [part.strip(_BLANK) for part in parts]
    if len(parts) != 2 or not all(parts):
        raise DataError(
            f"{where}: expected a word and its tag, parted by a tab or spaces, got {line!r:.80}"
        )
    return parts[0], parts[1]
