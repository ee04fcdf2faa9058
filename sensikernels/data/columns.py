"""Any rows of ``datasets`` as texts with labels: which column is which, and what labels mean.

A column that is not named is found if only one can be meant: the text and its pair by the names
that data sets give them, or as the only column of strings; the label by its name, as the only
``ClassLabel``, or as the only column left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sensikernels._core.errors import DataError, UsageError
from sensikernels.data import labels as coding
from sensikernels.data.labels import Coding
from sensikernels.data.tsv import Examples

LABELS: Final = ("label", "labels", "target", "class", "score")
TEXTS: Final = ("text", "sentence", "content", "review", "tweet", "document")
PAIRS: Final = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("query", "passage"),
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns; None: to be found (``pair``: there may be none)."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def from_dataset(
    dataset: Any,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    like: Examples | None = None,
    name: str = "dataset",
) -> Examples:
    """Rows of a ``datasets.Dataset`` as ``Examples``.

    ``text``, ``pair`` and ``label`` name its columns; what is not named is found if only one
    column can be meant. Labels are as ``data.labels`` says; those of a development split are coded
    ``like`` those of the training split. ``name`` is what errors call the data.

    Raises:
        UsageError: a column is not there, or which is meant is not clear; all are listed then.
        DataError: a row without a text or label, or with a label that ``like`` does not know.
    """
    columns = find_columns(dataset, Columns(text=text, pair=pair, label=label), name)
    assert columns.text is not None
    assert columns.label is not None
    texts = [_texts(dataset, c, name) for c in (columns.text, columns.pair) if c is not None]

    def where(row: int) -> str:
        return f"{name} row {row}: {columns.label}"

    labels = list(dataset[columns.label])
    if not labels:
        raise DataError(f"{name}: no rows")
    found: Coding
    if like is not None and like.coding is not None:
        found = like.coding
    else:
        found = coding.infer(labels, where, _class_names(dataset.features[columns.label]))
    return Examples(
        texts_a=texts[0],
        texts_b=texts[1] if len(texts) == 2 else None,
        labels=found.encode(labels, where),
        coding=found,
    )


def find_columns(dataset: Any, given: Columns, name: str) -> Columns:
    """All columns by name. Raises UsageError listing them where one is missing or not clear."""
    features = dataset.features
    for option, column in vars(given).items():
        if column is not None and column not in features:
            raise _unclear(f"{option}_column", f"a column of {name}", features, repr(column))
    label = given.label or _label(features, given, name)
    strings = [c for c in features if _is_string(features[c]) and c != label]
    if given.text is not None:
        return Columns(text=given.text, pair=given.pair, label=label)
    strings = [c for c in strings if c != given.pair]
    pairs = [pair for pair in PAIRS if set(pair) <= set(strings)]
    if len(pairs) == 1 and given.pair is None:
        return Columns(text=pairs[0][0], pair=pairs[0][1], label=label)
    named = [c for c in strings if c.lower() in TEXTS]
    for among in (named, strings):
        if len(among) == 1:
            return Columns(text=among[0], pair=given.pair, label=label)
    raise _unclear("text_column", f"the column of {name} that holds the text", features)


def _label(features: Any, given: Columns, name: str) -> str:
    free = [c for c in features if c not in (given.text, given.pair)]
    named = [c for c in free if c.lower() in LABELS]
    classes = [c for c in free if _class_names(features[c]) is not None]
    others = [c for c in free if given.text is not None or not _is_string(features[c])]
    for among in (named, classes, others):
        if len(among) == 1:
            return among[0]
    raise _unclear("label_column", f"the column of {name} that holds the label", features)


def _unclear(option: str, wanted: str, features: Any, got: str = "none") -> UsageError:
    held = ", ".join(features)
    return UsageError(f"{option}: expected {wanted}, got {got}; its columns are {held}")


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _class_names(feature: Any) -> Sequence[str] | None:
    """The names of a ``ClassLabel``, or of a list of them."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return names if isinstance(names, list) and names else None


def _texts(dataset: Any, column: str, name: str) -> list[str]:
    made = list(dataset[column])
    for row, text in enumerate(made):
        if not isinstance(text, str):
            raise DataError(f"{name} row {row}: {column}: expected a text, got {text!r:.60}")
    return made
