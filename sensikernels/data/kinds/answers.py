"""Questions whose answers are spans of a context, or not there: SQuAD v1.1 and v2.0."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sensikernels._core.checks import require
from sensikernels._core.errors import DataError
from sensikernels.data.kinds.base import Cut, Kind, Order, Settled
from sensikernels.data.metrics import as_array, library, require_finite
from sensikernels.data.rows import Encoded
from sensikernels.data.squad import Question, Questions, read_questions
from sensikernels.data.tasks import Split, Task
from sensikernels.data.tsv import find
from sensikernels.data.windows import AnswerTruth, Best, best_span, encode_windows

NULL_THRESHOLD = 0.0
"""A question is left unanswered if the null score is above the best span's by more than this."""


class Answers(Kind):
    """SQuAD's files; exact match and F1 by ``torchmetrics``, counted as the official scripts do."""

    suffixes = (".json",)
    cut = Cut(max_length=384, doc_stride=128)

    def read(self, task: Task, data_dir: str | Path, split: Split) -> Questions:
        return read_questions(find(task, data_dir, split))

    def texts(self, rows: Questions) -> list[tuple[str, ...]]:
        return [(question.context,) for question in rows.items]

    def settle(self, task: Task, train: Questions, dev: Questions) -> Settled:
        if dev.nulls and not train.nulls:
            raise DataError(
                f"{dev.path}: expected answers to all questions as in {train.path}, got some "
                "without: both must be SQuAD v1.1, or both v2.0"
            )
        empty = sum(not q.answers for q in train.items)
        version = f"v2.0, {empty:,} of {len(train):,} unanswerable" if train.nulls else "v1.1"
        dev = replace(dev, nulls=train.nulls)
        return Settled(task=task, train=train, dev=dev, notes=(f"questions: SQuAD {version}",))

    def encode(
        self, task: Task, rows: Questions, tokenizer: Any, cut: Cut, *, train: bool
    ) -> Encoded:
        assert cut.doc_stride is not None
        return encode_windows(
            rows, tokenizer, max_length=cut.max_length, doc_stride=cut.doc_stride, truth=not train
        )

    def score(self, task: Task, outputs: Any, truth: AnswerTruth) -> dict[str, float]:
        answers = answer(outputs, truth)
        return count(answers, truth.questions.items, nulls=truth.questions.nulls)

    def sample(self, task: Task) -> tuple[Any, Any]:
        item = Question("sample", "what?", "this", ((0, "this"),))
        truth = AnswerTruth(
            questions=Questions(items=[item], path=Path("sample"), nulls=False),
            question=np.zeros(1, np.int64),
            spans=np.asarray([[0, 4]], np.int32),
            offsets=np.asarray([0, 1]),
            null=np.zeros(1, np.int64),
        )
        return np.zeros((1, 2)), truth

    def predictions(
        self, task: Task, outputs: Any, truth: AnswerTruth, order: Order, suffix: str
    ) -> str:
        """The official form: an object of question ids and answers, empty where there is none."""
        return json.dumps(answer(outputs, truth), ensure_ascii=False, indent=1) + "\n"


def answer(outputs: Any, truth: AnswerTruth) -> dict[str, str]:
    """The answer to every question by its id, in file order; ``outputs`` is ``[tokens, 2]``.

    The best span of all windows of a question. Where questions may be unanswerable, the answer is
    empty if the lowest null score of its windows is above that span's by more than the threshold.
    """
    scores = as_array(outputs)
    shape = (len(truth.spans), 2)
    require(scores.shape == shape, "logits", f"shape {shape}", scores.shape)
    require_finite(scores)
    found = [Best(-np.inf, -1, -1)] * len(truth.questions)
    nulls = [np.inf] * len(truth.questions)
    for window, question in enumerate(truth.question.tolist()):
        at = slice(truth.offsets[window], truth.offsets[window + 1])
        starts, ends = scores[at].T
        found[question] = max(
            found[question], best_span(starts, ends, truth.spans[at]), key=lambda b: b.score
        )
        null = truth.null[window]
        nulls[question] = min(nulls[question], float(starts[null] + ends[null]))
    answers = {}
    for item, best, null in zip(truth.questions.items, found, nulls, strict=True):
        empty = best.start < 0 or (truth.questions.nulls and null - best.score > NULL_THRESHOLD)
        answers[item.id] = "" if empty else item.context[best.start : best.end]
    return answers


def count(answers: dict[str, str], items: Any, *, nulls: bool) -> dict[str, float]:
    """F1 and exact match as shares, as the official script of v2.0 (``nulls``) or v1.1 counts.

    Both take the best of a question's golds. In v2.0 golds that are nothing once normalised
    ("the", ".") do not count, and a question without golds wants an empty answer. In v1.1 they
    count for an exact match, and give an F1 of 0.
    """
    squad = library("torchmetrics.functional.text").squad
    empty = _normalised_to_nothing({text for item in items for _, text in item.answers}, squad)
    every = {item.id: [text for _, text in item.answers] for item in items}
    words = {name: [t for t in texts if t not in empty] for name, texts in every.items()}
    if nulls:
        golds = {name: texts or [""] for name, texts in words.items()}
        made = _shares(answers, golds, squad)
        return {"f1": made["f1"], "exact_match": made["exact_match"]}
    scored = {name: texts for name, texts in words.items() if texts}
    f1 = _shares(answers, scored, squad)["f1"] * len(scored) / len(every)
    return {"f1": f1, "exact_match": _shares(answers, every, squad)["exact_match"]}


def _shares(answers: dict[str, str], golds: dict[str, list[str]], squad: Any) -> dict[str, float]:
    if not golds:
        return {"f1": 0.0, "exact_match": 0.0}
    predicted = [{"id": name, "prediction_text": answers[name]} for name in golds]
    wanted = [
        {"id": name, "answers": {"text": texts, "answer_start": [0] * len(texts)}}
        for name, texts in golds.items()
    ]
    return {name: float(value) / 100 for name, value in squad(predicted, wanted).items()}


def _normalised_to_nothing(texts: set[str], squad: Any) -> set[str]:
    """The texts of articles, punctuation and blanks alone, asked of the library's own rules."""
    short = [t for t in texts if len("".join(filter(str.isalnum, t))) <= 3 * len(t.split())]
    return {t for t in short if _shares({"": ""}, {"": [t]}, squad)["exact_match"] == 1}
