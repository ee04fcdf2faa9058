"""Questions as windows of tokens, and answers as spans of them and back.

A context that does not fit beside its question is cut into windows, of which neighbours share
``doc_stride`` tokens. What a window has no answer in points at its first token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sensikernels._core.checks import require
from sensikernels.data.rows import CHUNK, Encoded, flat, pad_of, require_fast
from sensikernels.data.squad import Question, Questions

QUESTION = 64
"""Tokens of a question at most; the rest is cut, as BERT's authors do."""
LEAST = 8
"""Tokens that a question may have at least, whatever the stride."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerTruth:
    """Questions, and the windows they became.

    ``question``: int64 ``[windows]``. ``spans``: int32 ``[tokens, 2]``, the characters of the
    context that a token covers, (-1, -1) for tokens that are not of it; tokens of window ``i`` are
    ``offsets[i]:offsets[i + 1]``, ``null[i]`` the one that says no answer, counted in the window.
    """

    questions: Questions
    question: Array
    spans: Array
    offsets: Array
    null: Array

    def take(self, rows: Any) -> AnswerTruth:
        """These windows, in this order; all questions stay."""
        parts = [self.spans[self.offsets[i] : self.offsets[i + 1]] for i in rows]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return AnswerTruth(
            questions=self.questions,
            question=self.question[rows],
            spans=np.concatenate(parts),
            offsets=np.concatenate([[0], ends]),
            null=self.null[rows],
        )


class _Window(NamedTuple):
    ids: Any
    types: Any
    spans: Array
    null: int
    question: int


def encode_windows(
    rows: Questions, tokenizer: Any, *, max_length: int, doc_stride: int, truth: bool
) -> Encoded:
    """Windows of every question, in order, with the first answer's place in each.

    ``labels`` are int64 ``[windows, 2]``: the answer's first and last token, or the null token
    twice where the window does not hold it whole. Raises UsageError if the stride leaves no room.
    """
    require_fast(tokenizer, "answers")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    most = max_length - special - LEAST - 1
    require(doc_stride <= most, "doc_stride", f"at most {most} at {max_length}", doc_stride)
    limit = min(QUESTION, max_length - special - doc_stride - 1)
    made: list[_Window] = []
    for start in range(0, len(rows), CHUNK):
        part = rows.items[start : start + CHUNK]
        made += _windows(part, start, tokenizer, limit, max_length, doc_stride)
    question = np.asarray([window.question for window in made], np.int64)
    null = np.asarray([window.null for window in made], np.int64)
    answers = _covered([_answer(item) for item in rows.items], made)
    labels = np.asarray(
        [_place(w.spans, answers[w.question]) or (w.null, w.null) for w in made], np.int64
    )
    offsets = np.concatenate([[0], np.cumsum([len(w.ids) for w in made], dtype=np.int64)])
    kept = AnswerTruth(
        questions=rows,
        question=question,
        spans=np.concatenate([w.spans for w in made]),
        offsets=offsets,
        null=null,
    )
    return Encoded(
        input_ids=flat(w.ids for w in made),
        token_type_ids=None if made[0].types is None else flat(w.types for w in made),
        offsets=offsets,
        labels=labels,
        pad_token_id=pad_of(tokenizer),
        per="span",
        truth=kept if truth else None,
    )


def _windows(
    items: Any, start: int, tokenizer: Any, limit: int, max_length: int, doc_stride: int
) -> list[_Window]:
    out = tokenizer(
        [_short(item.text, tokenizer, limit) for item in items],
        [item.context for item in items],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
        return_attention_mask=False,
    )
    made = []
    for i, ids in enumerate(out["input_ids"]):
        spans = np.asarray(out["offset_mapping"][i], np.int32).reshape(-1, 2)
        inside = np.asarray([part == 1 for part in out.sequence_ids(i)])
        spans = np.where(inside[:, None], spans, np.int32(-1))
        cls = tokenizer.cls_token_id
        null = ids.index(cls) if cls in ids else 0
        types = out["token_type_ids"][i] if "token_type_ids" in out else None
        made.append(_Window(ids, types, spans, null, start + out["overflow_to_sample_mapping"][i]))
    return made


def _short(question: str, tokenizer: Any, limit: int) -> str:
    """The question, cut before the word that goes beyond ``limit`` tokens."""
    room = limit
    while True:
        out = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
        spans = out["offset_mapping"]
        if len(spans) <= limit:
            return question
        # Cut text may have more pieces than the whole had there: then cut more.
        question = question[: spans[room - 1][1]]
        room = max(1, room - 1)


def _answer(question: Question) -> tuple[int, int] | None:
    """First and last character, exclusive, of the first answer, without blanks around it."""
    if not question.answers:
        return None
    start, text = question.answers[0]
    bare = text.strip()
    if not bare:
        return None
    start += text.index(bare)
    return start, start + len(bare)


def _covered(
    answers: list[tuple[int, int] | None], windows: list[_Window]
) -> list[tuple[int, int] | None]:
    """The characters that the tokens of each answer cover, in whatever windows they are."""
    found: list[tuple[int, int] | None] = [None] * len(answers)
    for window in windows:
        answer, known = answers[window.question], found[window.question]
        if answer is None:
            continue
        held = window.spans[_of(window.spans, answer)]
        if len(held):
            low, high = int(held[0, 0]), int(held[-1, 1])
            known = known or (low, high)
            found[window.question] = min(low, known[0]), max(high, known[1])
    return found


def _of(spans: Array, answer: tuple[int, int]) -> Array:
    """The tokens of a window that cover a character of the answer."""
    low, high = spans.T
    return np.flatnonzero((high > low) & (high > answer[0]) & (low < answer[1]))


def _place(spans: Array, answer: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token of the answer in a window; None if it does not hold it whole."""
    if answer is None:
        return None
    held = _of(spans, answer)
    if not len(held) or (spans[held[0], 0], spans[held[-1], 1]) != answer:
        return None
    return int(held[0]), int(held[-1])


class Best(NamedTuple):
    """The best span of a question: its score, and characters of the context (none: -1)."""

    score: float
    start: int
    end: int


def best_span(
    starts: Array, ends: Array, spans: Array, *, best: int = 20, longest: int = 30
) -> Best:
    """The best span of one window among its ``best`` starts and ends, of ``longest`` tokens.

    ``starts`` and ``ends`` are ``[tokens]``, ``spans`` ``[tokens, 2]`` as in ``AnswerTruth``. Ties
    go to the higher-scored start, then the earlier token.
    """
    context = np.flatnonzero(spans[:, 1] > spans[:, 0])
    first = context[np.argsort(-starts[context], kind="stable")[:best]]
    last = context[np.argsort(-ends[context], kind="stable")[:best]]
    scores = starts[first][:, None] + ends[last][None]
    length = last[None] - first[:, None] + 1
    scores = np.where((length >= 1) & (length <= longest), scores, -np.inf)
    if not scores.size or not np.isfinite(scores.max()):
        return Best(-np.inf, -1, -1)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    return Best(float(scores[row, column]), int(spans[first[row], 0]), int(spans[last[column], 1]))
