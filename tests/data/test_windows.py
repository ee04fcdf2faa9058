"""Windows of long contexts: what they cover, and that every answer that fits one comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.data.batching import collate
from sensikernels.data.packing import collate_packed
from sensikernels.data.squad import Question, Questions
from sensikernels.data.windows import best_span, encode_windows
from tests.data.corpora import letters_tokenizer

TOKENIZER = letters_tokenizer()
WORDS = st.sampled_from(["the", "film", "good", "abc", "x-y", "\u200b", "é", "...", "日本", "'s"])
GAPS = st.sampled_from([" ", "  ", "\n", ""])


def windows(*items, max_length=24, doc_stride=6):
    rows = Questions(items=items, path=Path("dev.json"), nulls=False)
    return encode_windows(rows, TOKENIZER, max_length=max_length, doc_stride=doc_stride, truth=True)


def asked(context, start, end, text="what was good ?", name="q"):
    return Question(name, text, context, ((start, context[start:end]),))


def spans_of(encoded, window):
    truth = encoded.truth
    return truth.spans[truth.offsets[window] : truth.offsets[window + 1]]


@st.composite
def questions(draw):
    parts = draw(st.lists(st.tuples(WORDS, GAPS), min_size=1, max_size=40))
    context = "".join(word + gap for word, gap in parts)
    start = draw(st.integers(0, len(context) - 1))
    end = draw(st.integers(start + 1, min(len(context), start + 12)))
    return asked(context, start, end)


@given(item=questions(), stride=st.integers(0, 8))
@settings(max_examples=200)
def test_every_answer_that_fits_a_window_comes_back(item, stride):
    encoded = windows(item, doc_stride=stride)
    whole = TOKENIZER(item.context, add_special_tokens=False, return_offsets_mapping=True)
    ((start, text),) = item.answers
    end = start + len(text)
    covering = [
        (a, b) for a, b in whole["offset_mapping"] if b > start and a < end and text.strip()
    ]
    found = 0
    for window, (first, last) in enumerate(encoded.labels):
        spans, null = spans_of(encoded, window), encoded.truth.null[window]
        held = {(int(a), int(b)) for a, b in spans if b > a}
        fits = bool(covering) and set(covering) <= held
        assert ((first, last) != (null, null)) == fits
        if fits:
            found += 1
            low, high = spans[first, 0], spans[last, 1]
            assert (low, high) == (covering[0][0], covering[-1][1])
            # No token of the answer is lost; what is not in it has none, or is of such a token.
            assert item.context[max(low, start) : min(high, end)].strip("\u200b \n") == text.strip(
                "\u200b \n"
            )
    room = 24 - len(TOKENIZER(item.text)["input_ids"]) - 1
    if covering and len(covering) <= stride:  # neighbours share so many, and so one holds them all
        assert found >= 1
    assert all(n <= 24 for n in encoded.lengths)
    assert room > stride


@given(item=questions(), stride=st.integers(0, 8))
def test_windows_cover_the_context_and_share_the_stride(item, stride):
    encoded = windows(item, doc_stride=stride)
    whole = TOKENIZER(item.context, add_special_tokens=False)["input_ids"]
    inner = [
        encoded[w].input_ids[encoded[w].token_type_ids == 1][:-1].tolist()
        for w in range(len(encoded))
    ]
    joined = list(inner[0])
    for part in inner[1:]:
        assert part[:stride] == joined[len(joined) - stride :]
        joined += part[stride:]
    assert joined == whole


def test_the_first_answer_trains_and_blanks_around_it_do_not_count():
    context = "the film was good"
    two = Question("q", "what ?", context, ((9, "was"), (13, "good")))
    blank = asked(context, 8, 13, text="what ?")
    encoded = windows(two, blank)
    # [CLS] what ? [SEP] the film was good [SEP]
    assert encoded.labels.tolist() == [[6, 6], [6, 6]]
    assert encoded.per == "span"
    batch = collate([encoded[0], encoded[1]], pad_token_id=0, per="span")
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist()[:1] + [6]
    packed = collate_packed([encoded[0], encoded[1]], pad_token_id=0, per="span")
    assert packed["end_positions"].tolist() == [6, 6]
    assert "labels" not in packed


def test_no_answer_points_at_the_first_token():
    encoded = windows(Question("q", "what ?", "the film", ()))
    assert encoded.labels.tolist() == [[0, 0]]


def test_long_questions_are_cut_between_words():
    item = Question("q", "what " * 40 + "abc", "the film was good", ((13, "good"),))
    encoded = windows(item, max_length=24, doc_stride=6)
    assert len(encoded) == 1
    ids = encoded[0].input_ids.tolist()
    assert ids.count(TOKENIZER.vocab["what"]) == 24 - 3 - 6 - 1
    assert encoded.labels.tolist() != [[0, 0]]
    far = windows(Question("q", "abc " * 40, "x", ((0, "x"),)), max_length=384, doc_stride=128)
    assert far.lengths.max() <= 64 + 3 + 1


def test_empty_question_and_context():
    encoded = windows(Question("q", "", "the", ((0, "the"),)), Question("r", "what", "", ()))
    assert encoded.truth.question.tolist() == [0, 1]
    assert encoded.labels.tolist() == [[2, 2], [0, 0]]


def test_a_stride_that_leaves_no_room():
    with pytest.raises(UsageError, match="doc_stride: expected at most 12 at 24, got 13"):
        windows(asked("the film", 0, 3), doc_stride=13)
    windows(asked("the film " * 30, 0, 3, text="what " * 50), doc_stride=12)


def test_best_span_by_hand():
    spans = np.asarray([[-1, -1], [0, 3], [4, 8], [9, 12]])
    starts = np.asarray([9.0, 1.0, 3.0, 5.0])
    ends = np.asarray([9.0, 4.0, 2.0, 1.0])
    # Starts after ends do not count: 5 + 1 at the last token, 3 + 2, 1 + 4; 3 + 4 runs backwards.
    assert best_span(starts, ends, spans) == (6.0, 9, 12)
    assert best_span(starts, ends, spans, best=1).start == -1  # token 3 to token 1
    ends[3] = -9
    assert best_span(starts, ends, spans) == (5.0, 4, 8)  # the tie goes to the higher start
    assert best_span(starts[:1], ends[:1], spans[:1]).start == -1


@given(seed=st.integers(0, 10_000), longest=st.integers(1, 12))
def test_best_span_is_the_best_of_all_pairs(seed, longest):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 15))
    starts, ends = rng.normal(size=(2, count))
    spans = np.stack([np.arange(count) * 2, np.arange(count) * 2 + 1], 1)
    spans[rng.random(count) < 0.3] = -1
    legal = [
        starts[i] + ends[j]
        for i in range(count)
        for j in range(i, min(count, i + longest))
        if spans[i, 0] >= 0 <= spans[j, 0]
    ]
    assert best_span(starts, ends, spans, longest=longest).score == max(legal, default=-np.inf)


def test_real_answers_come_back(squad_data_dir):
    from sensikernels.data import embedded_model_path, load
    from sensikernels.hf import load_tokenizer

    rows = load("squad", data_dir=squad_data_dir, split="dev").take(np.arange(0, 4961, 10))
    encoded = encode_windows(
        rows, load_tokenizer(embedded_model_path()), max_length=384, doc_stride=128, truth=True
    )
    truth, seen = encoded.truth, set()
    for window, (first, last) in enumerate(encoded.labels):
        if last == 0:
            continue
        item = rows.items[truth.question[window]]
        spans = spans_of(encoded, window)
        start, text = item.answers[0]
        got = item.context[spans[first, 0] : spans[last, 1]]
        assert text.strip() in got  # a token may be longer than the answer, never shorter
        seen.add(item.id)
    assert len(seen) == len(rows)
