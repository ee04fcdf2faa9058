"""Tags of words: which pieces carry them, and scores over all words of the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sensikernels._core.errors import DataError, SensiError, UsageError
from sensikernels.data import compute, get_task, kind_of
from sensikernels.data.batching import collate
from sensikernels.data.kinds import Cut
from sensikernels.data.packing import collate_packed
from sensikernels.data.rows import IGNORED
from tests.data.corpora import write_conll

TASK = replace(get_task("ner"), label_names=("O", "B-A", "I-A"))
KIND = kind_of(TASK)


@pytest.fixture
def encode(tokenizer, tmp_path):
    def make(*sentences, train=False, max_length=128):
        path = write_conll(tmp_path / "dev.conll", sentences)
        rows = KIND.read(TASK, path.parent, "dev")
        return KIND.encode(TASK, rows, tokenizer, Cut(max_length=max_length), train=train)

    return make


def outputs(encoded, tag):
    """Logits that choose ``tag(token)`` for each token."""
    chosen = [tag(i) for i in range(len(encoded.input_ids))]
    return torch.nn.functional.one_hot(torch.tensor(chosen), 3).float()


def test_the_first_piece_of_a_word_has_its_tag(encode):
    encoded = encode([("the", "O"), ("abc", "B-A"), ("x-y", "I-A")])
    i = IGNORED  # [CLS] the a ##b ##c x - y [SEP]
    assert encoded.labels.tolist() == [i, 0, 1, i, i, 2, i, i, i]
    assert encoded.per == "token"
    assert encoded[0].label.tolist() == encoded.labels.tolist()


def test_words_without_pieces_and_words_cut_off_are_o(encode):
    # U+200B gives no piece; max_length 5 holds three words.
    gone = [("\u200b", "B-A"), ("the", "B-A"), ("film", "I-A"), ("was", "O"), ("good", "B-A")]
    encoded = encode(gone, [("plot", "B-A")], max_length=5)
    assert encoded.labels.tolist() == [IGNORED, 1, 2, 0, IGNORED, IGNORED, 1, IGNORED]
    perfect = outputs(encoded, lambda i: max(0, encoded.labels[i]))
    # Gold: \u200b; the film; good; plot. Found: the film, plot.
    got = compute(TASK, perfect, encoded.truth)
    assert got == {"f1": pytest.approx(4 / 6), "precision": 1.0, "recall": 0.5}
    text = KIND.predictions(TASK, perfect, encoded.truth, np.arange(2), ".conll")
    assert text == "\u200b\tO\nthe\tB-A\nfilm\tI-A\nwas\tO\ngood\tO\n\nplot\tB-A\n"


def test_entities_by_hand(encode):
    encoded = encode([("the", "B-A"), ("film", "I-A"), ("was", "O"), ("good", "B-A")])
    guess = {1: 1, 2: 0, 3: 0, 4: 1}  # the: too short; good: right
    got = compute(TASK, outputs(encoded, lambda i: guess.get(i, 0)), encoded.truth)
    assert got == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


def test_nothing_predicted_is_zero_and_says_nothing(encode, recwarn):
    encoded = encode([("the", "B-A")])
    got = compute(TASK, outputs(encoded, lambda i: 0), encoded.truth)
    assert set(got.values()) == {0.0}
    assert not recwarn.list


def test_rows_in_another_order_come_back_in_the_files(encode):
    encoded = encode([("the", "B-A")], [("film", "O"), ("was", "I-A")], [("good", "B-A")])
    order = np.asarray([2, 0, 1])
    moved = encoded.take(order)
    assert moved.truth.words.words == [["good"], ["the"], ["film", "was"]]
    perfect = outputs(moved, lambda i: max(0, moved.labels[i]))
    text = KIND.predictions(TASK, perfect, moved.truth, order, ".conll")
    assert text == "the\tB-A\n\nfilm\tO\nwas\tI-A\n\ngood\tB-A\n"
    assert compute(TASK, perfect, moved.truth)["f1"] == 1.0


def test_training_leaves_out_sentences_that_teach_nothing(encode):
    sentences = [("\u200b", "O")], [("the", "B-A")]
    assert len(encode(*sentences)) == 2
    kept = encode(*sentences, train=True)
    assert len(kept) == 1
    assert kept.truth is None
    with pytest.raises(DataError, match="expected words that the tokenizer knows"):
        encode(sentences[0], train=True)


def test_collated_padded_and_packed(encode):
    encoded = encode([("the", "B-A")], [("film", "O"), ("abc", "I-A")])
    rows = [encoded[0], encoded[1]]
    padded = collate(rows, pad_token_id=0, per="token")
    i = IGNORED
    assert padded["labels"].tolist() == [[i, 1, *[i] * 6], [i, 0, 2, *[i] * 5]]
    packed = collate_packed(rows, pad_token_id=0, per="token")
    assert packed["labels"].shape == packed["input_ids"].shape == (1, 32)
    assert packed["labels"][0, :9].tolist() == [i, 1, i, i, 0, 2, i, i, i]
    assert (packed["labels"][0, 9:] == i).all()
    assert encoded.weights.tolist() == [1, 2]


def test_wrong_outputs(encode):
    encoded = encode([("the", "B-A")])
    with pytest.raises(UsageError, match=r"logits: expected shape \(3, 3\), got \(2, 3\)"):
        compute(TASK, torch.zeros(2, 3), encoded.truth)
    bad = torch.zeros(3, 3)
    bad[1, 1] = float("nan")
    with pytest.raises(SensiError, match="training diverged"):
        compute(TASK, bad, encoded.truth)


def test_a_tokenizer_that_tells_no_words(encode, tokenizer, tmp_path):
    class Slow:
        pad_token_id = 0
        is_fast = False

    path = write_conll(tmp_path / "dev.conll", [[("the", "O")]])
    rows = KIND.read(TASK, path.parent, "dev")
    with pytest.raises(UsageError, match="model: expected a fast tokenizer, .* got Slow"):
        KIND.encode(TASK, rows, Slow(), Cut(), train=False)


def test_a_missing_library_names_the_extra(encode, monkeypatch):
    import sys

    encoded = encode([("the", "B-A")])
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(UsageError, match=r"expected seqeval.metrics installed.*\[glue\]"):
        compute(TASK, outputs(encoded, lambda i: 0), encoded.truth)
