from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from sensikernels import data
from sensikernels._core.errors import UsageError
from sensikernels._core.products import float32_products
from sensikernels.data import demo


@pytest.fixture(scope="module")
def train():
    return demo.generate("train")


@pytest.fixture(scope="module")
def dev():
    return demo.generate("dev")


def digest(examples):
    text = "\n".join(
        f"{label} {text}" for label, text in zip(examples.labels, examples.texts_a, strict=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_sizes_and_balance(train, dev):
    assert (len(train), len(dev)) == (demo.TRAIN_ROWS, demo.DEV_ROWS)
    for part in (train, dev):
        assert part.texts_b is None
        assert part.labels.dtype == np.int64
        assert part.labels.sum() * 2 == len(part)


def test_no_sentence_occurs_twice(train, dev):
    assert len({*train.texts_a, *dev.texts_a}) == len(train) + len(dev)


def test_the_same_on_every_machine(train, dev):
    assert (digest(train), digest(dev)) == ("b9bfc21c969612a3", "c5271f83c0b721ba")


def test_another_seed_is_another_task(dev):
    other = demo.generate("dev", seed=1)
    assert len({*other.texts_a} & {*dev.texts_a}) < len(dev) / 4


def test_fewer_rows_are_a_prefix(train, dev):
    assert demo.generate("train", rows=100).texts_a == train.texts_a[:100]
    assert demo.generate("dev", rows=100).texts_a == dev.texts_a[:100]


def test_lengths_vary(train):
    lengths = np.array([len(text.split()) for text in train.texts_a])
    assert lengths.min() <= 6
    assert lengths.max() >= 40
    assert 12 <= lengths.mean() <= 20


@pytest.mark.parametrize(("split", "rows"), [("train", 0), ("train", 3), ("dev", 4096)])
def test_rows_out_of_range(split, rows):
    with pytest.raises(UsageError, match="rows: expected"):
        demo.generate(split, rows=rows)


CLAIMS = [
    ("the plot was very gripping", True),
    ("the plot was dull", False),
    ("the plot was not dull", True),
    ("nobody thought that the plot was dull", True),
    ("nobody thought that the plot was not dull", False),
    ("the plot did not move me", False),
    ("i doubt that the plot did not move me", True),
    ("the claim that the plot was dull is false", True),
    ("to say that the plot was far from dull would be a lie", False),
]


def claim_polarity(text):
    """Polarity read back from the words: that of the word of feeling, negated as often as said."""
    outer = False
    for before, after in demo._OUTER:
        if text.startswith(f"{before} ") and text.endswith(after):
            outer, text = True, text.removeprefix(f"{before} ").removesuffix(f" {after}")
            break
    polarity = [
        positive
        for positive, adjectives in demo._ADJECTIVES.items()
        if text.split()[-1] in adjectives
    ] + [
        positive
        for positive, verbs in demo._VERBS.items()
        if any(text.endswith(form) for form in {form for verb in verbs for form in verb})
    ]
    assert len(polarity) == 1, text
    inner = any(f" {link} " in text for links in demo._INNER.values() for link in links)
    return polarity[0] ^ outer ^ (inner or " did not " in text)


def sentence_polarity(text):
    """The grammar of the module's docstring, read backwards."""
    text = text.removesuffix(" .")
    for opening in demo._OPENINGS:
        text = text.removeprefix(f"{opening} , ")
    for closing in demo._CLOSINGS:
        text = text.removesuffix(f" {closing}")
    for turn in sorted(demo._TURNS, key=len, reverse=True):
        if f" , {turn} " in text:
            return claim_polarity(text.split(f" , {turn} ")[1])
    for concession in demo._CONCESSIONS:
        if text.startswith(f"{concession} "):
            return claim_polarity(text.split(" , ")[1])
        if f" {concession} " in text:
            return claim_polarity(text.split(f" {concession} ")[0])
    return claim_polarity(text.split(" and ")[-1])


@pytest.mark.parametrize(("text", "positive"), CLAIMS)
def test_the_reader_reads(text, positive):
    assert claim_polarity(text) == positive


def test_labels_follow_the_grammar(train, dev):
    for part in (train, dev):
        for text, label in zip(part.texts_a, part.labels, strict=True):
            assert sentence_polarity(text) == bool(label), text


def test_words_have_a_long_tail(train):
    """The second half of the adjectives makes a fifth of them, in words seen a few times each."""
    words = [word for text in train.texts_a for word in text.split()]
    halves = [
        [words.count(w) for adjectives in demo._ADJECTIVES.values() for w in adjectives[half]]
        for half in (slice(0, 40), slice(40, None))
    ]
    common, rare = halves
    assert 0.17 < sum(rare) / (sum(common) + sum(rare)) < 0.25
    assert np.median(rare) < 12 < np.median(common)


@pytest.mark.parametrize("words", [1, 2], ids=["words", "word pairs"])
def test_counting_words_does_not_solve_it(train, dev, words):
    sklearn = pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    assert sklearn
    counts = CountVectorizer(ngram_range=(1, words), token_pattern=r"\S+")
    seen = counts.fit_transform(train.texts_a)
    unseen = counts.transform(dev.texts_a)
    for strength in (0.01, 0.1, 1.0):
        model = LogisticRegression(C=strength, max_iter=3000).fit(seen, train.labels)
        # The grammar's truth is 1.0. Measured: 0.56 to 0.60.
        assert model.score(unseen, dev.labels) < 0.70


@pytest.fixture
def fast_products():
    with float32_products("cpu"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("fast_products")
def test_minilm_learns_it_in_one_epoch(train, dev):
    transformers = pytest.importorskip("transformers")
    folder = data.embedded_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = data.Batches(data.encode(train, tokenizer), batch_size=32)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / steps)
    )
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        outputs = [
            (model(**batch).logits, batch["labels"])
            for batch in data.Batches(data.encode(dev, tokenizer), batch_size=64, shuffle=False)
        ]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    assert data.compute("demo", logits, labels)["accuracy"] > 0.85
