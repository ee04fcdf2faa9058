"""Held-out rows are the same for every seed, and no training row shares a text with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.data import load
from sensikernels.data.conll import Words
from sensikernels.data.held_out import held_out
from sensikernels.data.kinds import kind_of
from sensikernels.data.load import Places, load_splits
from sensikernels.data.squad import Question, Questions
from sensikernels.data.tasks import get_task
from sensikernels.data.tsv import Examples

SEQUENCES = kind_of(get_task("sst2"))


def rows_of(texts: list[str], second: list[str] | None = None) -> Examples:
    return Examples(texts_a=texts, texts_b=second, labels=np.arange(len(texts)))


def share(one: str, other: str) -> bool:
    """The rule, word by word: the shorter text, of four words or more, is a part of the longer."""
    short, long = sorted((one.split(), other.split()), key=len)
    if len(short) < 4:
        return short == long
    return any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))


TEXTS = st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=7).map(" ".join), min_size=6)


@given(TEXTS, st.integers(1, 3), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 4)))
def test_no_training_row_shares_a_text(
    texts: list[str], count: int, seed: int, wanted: int | None
) -> None:
    rows = rows_of(texts)
    try:
        train, held = held_out(SEQUENCES, rows, count, wanted, seed)
    except UsageError:  # every other row shares a text with a held-out one
        assume(False)
    assert len(held) == count
    assert not set(train.labels.tolist()) & set(held.labels.tolist())
    assert not any(share(a, b) for a in train.texts_a for b in held.texts_a)
    free = [t for t in texts if not any(share(t, b) for b in held.texts_a)]
    assert len(train) == (len(free) if wanted is None else min(wanted, len(free)))
    assert train.labels.tolist() == sorted(train.labels.tolist())


def test_every_seed_is_judged_by_the_same_rows() -> None:
    rows = load("demo", split="train")
    kept = [held_out(SEQUENCES, rows, 50, 100, seed) for seed in (0, 1)]
    assert kept[0][1].texts_a == kept[1][1].texts_a
    assert kept[0][0].texts_a != kept[1][0].texts_a
    more = held_out(SEQUENCES, rows, 50, 200, 0)[0]
    assert set(kept[0][0].texts_a) <= set(more.texts_a)


def test_a_pair_shares_either_text_and_contexts_and_sentences_count() -> None:
    long = "one long sentence that many rows have"
    pairs = rows_of(["a", "b", "c", "d"], [long, long, "something else", long])
    train, held = held_out(SEQUENCES, pairs, 1, None, 0)
    assert long not in train.texts_b or long not in held.texts_b
    where = Path("x")
    asked = [Question(str(i), f"q{i}", f"context {i // 2} has many words", ()) for i in range(6)]
    questions = Questions(items=asked, path=where, nulls=False)
    train, held = held_out(kind_of(get_task("squad")), questions, 1, None, 0)
    assert len(train) == 4
    assert {q.context for q in train.items}.isdisjoint({q.context for q in held.items})
    words = Words(words=[list("abcd")] * 3 + [["e"]], tags=[["O"]] * 4, lines=[1] * 4, path=where)
    train, held = held_out(kind_of(get_task("ner")), words, 1, None, 0)
    assert {tuple(w) for w in train.words}.isdisjoint({tuple(w) for w in held.words})


def test_a_run_trains_and_is_scored_on_training_rows() -> None:
    settled = load_splits("demo", Places(), max_train_samples=40, held_out=30)
    whole = load("demo", split="train")
    assert (len(settled.train), len(settled.dev)) == (40, 30)
    assert set(settled.dev.texts_a) <= set(whole.texts_a)
    assert "held out: 30 rows" in settled.notes


def test_the_same_development_rows_are_scored_by_every_seed() -> None:
    whole = load("demo", split="dev")
    drawn = [load_splits("demo", Places(), max_eval_samples=30, seed=s).dev for s in (0, 1)]
    assert drawn[0].texts_a == drawn[1].texts_a
    assert len(drawn[0]) == 30 < len(whole)
    assert set(drawn[0].texts_a) <= set(whole.texts_a)
    every = load_splits("demo", Places(), max_eval_samples=10**6).dev
    assert every.texts_a == whole.texts_a


def test_too_many_are_refused() -> None:
    with pytest.raises(UsageError, match="^held_out: expected fewer than the 3 training rows, got"):
        held_out(SEQUENCES, rows_of(["a", "b", "c"]), 3, None, 0)
    with pytest.raises(UsageError, match="^held_out: expected rows that leave others to train on"):
        held_out(SEQUENCES, rows_of(["a", "a", "a"]), 1, None, 0)
