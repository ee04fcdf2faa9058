"""Words with a tag each, for named entities: the first piece of a word carries its tag.

A word that gives no piece, or that ``max_length`` cut off, is predicted as ``O``: scores are over
all words of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sensikernels._core.checks import require
from sensikernels._core.errors import DataError
from sensikernels.data.conll import OUTSIDE, Words, check_tags, read_words, tag_set
from sensikernels.data.kinds.base import Cut, Kind, Order, Settled, inverse
from sensikernels.data.metrics import as_array, library, require_finite
from sensikernels.data.rows import CHUNK, IGNORED, Encoded, flat, pad_of, require_fast
from sensikernels.data.tasks import Split, Task
from sensikernels.data.tsv import find

_NONE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTruth:
    """Sentences and where their words went: ``first`` is int32 ``[tokens]``, the word that a token
    is the first piece of, else -1; tokens of sentence ``i`` are ``offsets[i]:offsets[i + 1]``."""

    words: Words
    first: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def take(self, rows: Any) -> TokenTruth:
        """These sentences, in this order."""
        parts = [self.first[self.offsets[i] : self.offsets[i + 1]] for i in rows]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return TokenTruth(
            words=self.words.take(rows),
            first=np.concatenate(parts),
            offsets=np.concatenate([[0], ends]),
        )


class Tokens(Kind):
    """Two-column CoNLL files, scored by ``seqeval``."""

    suffixes = (".conll", ".txt")

    def read(self, task: Task, data_dir: str | Path, split: Split) -> Words:
        return read_words(find(task, data_dir, split))

    def texts(self, rows: Words) -> list[tuple[str, ...]]:
        return [(" ".join(words),) for words in rows.words]

    def settle(self, task: Task, train: Words, dev: Words) -> Settled:
        names = tag_set(train)
        check_tags(dev, names)
        note = f"labels: {len(names)} tags of words: {', '.join(names)}"
        return Settled(task=replace(task, label_names=names), train=train, dev=dev, notes=(note,))

    def encode(self, task: Task, rows: Words, tokenizer: Any, cut: Cut, *, train: bool) -> Encoded:
        require_fast(tokenizer, "words")
        parts = [
            _tokenised(rows.words[start : start + CHUNK], tokenizer, cut.max_length)
            for start in range(0, len(rows), CHUNK)
        ]
        ids, types, first = ([row for part in parts for row in part[i]] for i in range(3))
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)])
        index = {name: i for i, name in enumerate(task.label_names)}
        labels = np.full(int(offsets[-1]), IGNORED, np.int64)
        pieces = flat(first)
        for row, tags in enumerate(rows.tags):
            at = slice(offsets[row], offsets[row + 1])
            placed = pieces[at] != _NONE
            labels[at][placed] = [index[tags[word]] for word in pieces[at][placed]]
        made = Encoded(
            input_ids=flat(ids),
            token_type_ids=flat(types) if types else None,
            offsets=offsets,
            labels=labels,
            pad_token_id=pad_of(tokenizer),
            per="token",
            truth=None if train else TokenTruth(words=rows, first=pieces, offsets=offsets),
        )
        return _with_words(made, rows) if train else made

    def score(self, task: Task, outputs: Any, truth: TokenTruth) -> dict[str, float]:
        predicted = _tags(task, outputs, truth)
        measures = library("seqeval.metrics")
        gold = [list(tags) for tags in truth.words.tags]
        return {
            name: float(getattr(measures, f"{name}_score")(gold, predicted, zero_division=0))
            for name in task.metrics
        }

    def sample(self, task: Task) -> tuple[Any, Any]:
        words = Words(words=[["word"]], tags=[[OUTSIDE]], lines=[1], path=Path("sample"))
        first = np.zeros(1, np.int32)
        truth = TokenTruth(words=words, first=first, offsets=np.asarray([0, 1]))
        return np.zeros((1, task.num_labels)), truth

    def predictions(
        self, task: Task, outputs: Any, truth: TokenTruth, order: Order, suffix: str
    ) -> str:
        """CoNLL as it was read, with the predicted tags."""
        tags = _tags(task, outputs, truth)
        sentences = []
        for at in inverse(order):
            pairs = zip(truth.words.words[at], tags[at], strict=True)
            sentences.append("".join(f"{word}\t{tag}\n" for word, tag in pairs))
        return "\n".join(sentences)


def _tokenised(words: Any, tokenizer: Any, max_length: int) -> tuple[Any, Any, Any]:
    """Ids, token types (none: empty) and the words that tokens are the first pieces of."""
    out = tokenizer(
        [list(row) for row in words],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    first = []
    for row in range(len(words)):
        seen = _NONE
        places = []
        for word in out.word_ids(row):
            new = word is not None and word != seen
            places.append(word if new else _NONE)
            seen = seen if word is None else word
        first.append(places)
    return out["input_ids"], out.get("token_type_ids", []), first


def _with_words(encoded: Encoded, rows: Words) -> Encoded:
    """Without the sentences that have no labelled piece: a batch of them has no loss."""
    weights = encoded.weights
    assert weights is not None
    held = np.flatnonzero(weights)
    if not len(held):
        raise DataError(f"{rows.path}: expected words that the tokenizer knows, got none")
    return encoded if len(held) == len(encoded) else encoded.take(held)


def _tags(task: Task, outputs: Any, truth: TokenTruth) -> list[list[str]]:
    """The predicted tag of every word."""
    scores = as_array(outputs)
    shape = (len(truth.first), task.num_labels)
    require(scores.shape == shape, "logits", f"shape {shape}", scores.shape)
    require_finite(scores)
    best = scores.argmax(axis=1)
    made = []
    for row, words in enumerate(truth.words.words):
        tags = [OUTSIDE] * len(words)
        for token in range(truth.offsets[row], truth.offsets[row + 1]):
            if truth.first[token] != _NONE:
                tags[truth.first[token]] = task.label_names[best[token]]
        made.append(tags)
    return made
