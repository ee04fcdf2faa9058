"""Exact match and F1, by hand and against the official rules written down once more."""

from __future__ import annotations

import json
import re
import string
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.data import compute, get_task, kind_of
from sensikernels.data.kinds.answers import answer, count
from sensikernels.data.squad import Question, Questions
from sensikernels.data.windows import encode_windows
from tests.data.corpora import letters_tokenizer

TASK = get_task("squad")
TOKENIZER = letters_tokenizer()


def ask(name, *golds, context="the film was good"):
    return Question(name, "what ?", context, tuple((0, gold) for gold in golds))


# The rules, from the description of the two scripts: lower case, then no punctuation, then no
# articles, then single blanks; words in common as a multiset; the best of all golds.


def plain(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", kept).split()


def overlap(guess, gold, both_empty):
    ours, theirs = plain(guess), plain(gold)
    if not ours or not theirs:
        return both_empty * float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def by_the_rules(guesses, items, nulls):
    f1 = exact = 0.0
    for item in items:
        golds = [text for _, text in item.answers]
        if nulls:
            golds = [gold for gold in golds if plain(gold)] or [""]
        exact += max(float(plain(guesses[item.id]) == plain(gold)) for gold in golds)
        f1 += max(overlap(guesses[item.id], gold, float(nulls)) for gold in golds)
    return {"f1": f1 / len(items), "exact_match": exact / len(items)}


TEXTS = st.lists(
    st.sampled_from(["a", "an", "The", "film", "Film", "was", ".", "x-y", "xy", "1,000", "ü", "—"]),
    max_size=5,
).map(" ".join)


@given(
    rows=st.lists(st.tuples(TEXTS, st.lists(TEXTS, max_size=3)), min_size=1, max_size=6),
    nulls=st.booleans(),
)
def test_the_library_counts_as_the_rules_do(rows, nulls):
    items = [ask(str(i), *(golds or ([] if nulls else ["x"]))) for i, (_, golds) in enumerate(rows)]
    guesses = {str(i): guess for i, (guess, _) in enumerate(rows)}
    got = count(guesses, items, nulls=nulls)
    assert got == pytest.approx(by_the_rules(guesses, items, nulls), abs=1e-6)


@pytest.mark.parametrize(
    ("guess", "golds", "nulls", "f1", "exact"),
    [
        ("The Film!", ["film"], False, 1, 1),
        ("the good film", ["film was"], False, 2 * 1 / 4, 0),
        ("good good film", ["good film"], False, 2 * 2 / 5, 0),
        ("x", ["film", "an x"], False, 1, 1),
        ("", ["film"], False, 0, 0),
        (".", ["."], False, 0, 1),  # v1.1: nothing in common is no F1
        (".", [".", "film"], True, 0, 0),  # v2.0: such a gold does not count
        (".", ["."], True, 1, 1),
        ("", [], True, 1, 1),
        ("film", [], True, 0, 0),
        ("the", [], True, 1, 1),
    ],
)
def test_by_hand(guess, golds, nulls, f1, exact):
    got = count({"q": guess}, [ask("q", *golds)], nulls=nulls)
    assert got == {"f1": pytest.approx(f1), "exact_match": exact}
    assert got == pytest.approx(by_the_rules({"q": guess}, [ask("q", *golds)], nulls))
    assert list(got) == list(TASK.metrics)


CONTEXT = "the film was good " * 12


@pytest.fixture
def encoded():
    first = Question("one", "what ?", CONTEXT.strip(), ((13, "good"),))
    second = Question("two", "what ?", "the plot", ((4, "plot"),))
    rows = Questions(items=[first, second], path=Path("dev.json"), nulls=False)
    made = encode_windows(rows, TOKENIZER, max_length=24, doc_stride=6, truth=True)
    assert made.truth.question.tolist() == [0] * (len(made) - 1) + [1]
    assert len(made) > 3
    return made


def scores(encoded):
    return torch.zeros(len(encoded.input_ids), 2)


def at(encoded, window, token):
    return int(encoded.offsets[window]) + token


def test_the_best_of_all_windows(encoded):
    outputs = scores(encoded)
    outputs[at(encoded, 0, 5), 0] = outputs[at(encoded, 0, 5), 1] = 2  # film
    outputs[at(encoded, 2, 4), 0] = outputs[at(encoded, 2, 6), 1] = 3
    outputs[at(encoded, len(encoded) - 1, 5)] = 1
    got = answer(outputs, encoded.truth)
    spans = encoded.truth.spans[at(encoded, 2, 4) : at(encoded, 2, 7)]
    assert got == {"one": CONTEXT[spans[0, 0] : spans[-1, 1]], "two": "plot"}
    assert list(got) == ["one", "two"]


def test_order_of_windows_and_the_file(encoded):
    outputs = scores(encoded)
    outputs[at(encoded, 0, 7)] = 2
    outputs[at(encoded, len(encoded) - 1, 5)] = 1
    assert compute(TASK, outputs, encoded.truth) == {"f1": 1.0, "exact_match": 1.0}
    order = np.arange(len(encoded))[::-1].copy()
    moved = encoded.take(order)
    parts = [outputs[at(encoded, w, 0) : at(encoded, w, 0) + encoded.lengths[w]] for w in order]
    text = kind_of(TASK).predictions(TASK, torch.cat(parts), moved.truth, order, ".json")
    assert json.loads(text) == {"one": "good", "two": "plot"}


@pytest.mark.parametrize(("null", "said"), [(3.0, "plot"), (3.01, "")])
def test_unanswerable_where_null_is_above_the_span(encoded, null, said):
    outputs = scores(encoded)
    last = len(encoded) - 1
    outputs[at(encoded, last, 5)] = 1.5
    outputs[at(encoded, last, 0), 0] = null
    assert answer(outputs, encoded.truth)["two"] == "plot"  # v1.1 always answers
    object.__setattr__(encoded.truth.questions, "nulls", True)
    assert answer(outputs, encoded.truth)["two"] == said


def test_the_lowest_null_of_the_windows_counts(encoded):
    object.__setattr__(encoded.truth.questions, "nulls", True)
    outputs = scores(encoded)
    outputs[at(encoded, 0, 7)] = 1
    for window in range(1, len(encoded) - 1):
        outputs[at(encoded, window, 0)] = 9
    assert answer(outputs, encoded.truth)["one"] == "good"


def test_a_context_without_a_token(encoded):
    rows = Questions(items=[Question("q", "what", "", ())], path=Path("d"), nulls=False)
    made = encode_windows(rows, TOKENIZER, max_length=24, doc_stride=6, truth=True)
    assert answer(scores(made), made.truth) == {"q": ""}


def test_wrong_outputs(encoded, monkeypatch):
    with pytest.raises(UsageError, match=r"logits: expected shape \(\d+, 2\), got \(3, 2\)"):
        compute(TASK, torch.zeros(3, 2), encoded.truth)
    outputs = scores(encoded)
    outputs[1, 0] = float("inf")
    with pytest.raises(SensiError, match="training diverged"):
        compute(TASK, outputs, encoded.truth)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    with pytest.raises(UsageError, match=r"expected torchmetrics.*\[glue\]"):
        compute(TASK, scores(encoded), encoded.truth)
