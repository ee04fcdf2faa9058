"""Columns of real ``datasets`` as texts and labels."""

from __future__ import annotations

import pytest

from sensikernels._core.errors import DataError, UsageError
from sensikernels.data import from_dataset

datasets = pytest.importorskip("datasets")


def made(**columns):
    return datasets.Dataset.from_dict({name.strip("_"): v for name, v in columns.items()})


TWO = ["a film", "a plot"]


@pytest.mark.parametrize(
    ("columns", "pair"),
    [
        ({"text": TWO, "label": [0, 1]}, None),
        ({"idx": [5, 6], "sentence": TWO, "label": [0, 1]}, None),
        ({"title": ["x", "y"], "text": TWO, "labels": ["p", "q"]}, None),
        ({"remark": TWO, "mood": [0, 1]}, None),
        ({"Text": TWO, "Label": ["p", "q"]}, None),
        ({"sentence1": TWO, "sentence2": ["b", "c"], "label": [0, 1]}, ["b", "c"]),
        ({"premise": TWO, "hypothesis": ["b", "c"], "idx": [1, 2], "label": [0, 1]}, ["b", "c"]),
    ],
)
def test_found(columns, pair):
    rows = from_dataset(made(**columns))
    assert rows.texts_a == TWO
    assert rows.texts_b == pair
    assert rows.labels.tolist() == [0, 1]


def test_named():
    data = made(a=TWO, b=["x", "y"], c=["p", "q"], d=[0.5, 1.5])
    rows = from_dataset(data, text="b", pair="a", label="c")
    assert (rows.texts_a, rows.texts_b) == (["x", "y"], TWO)
    assert rows.coding.names == ("p", "q")
    assert from_dataset(data, text="b", label="d").coding.problem == "scores"
    # The text named, all others but one too: that one is the label.
    assert from_dataset(made(a=TWO, b=["x", "y"]), text="a").coding.names == ("x", "y")


def test_class_label_features():
    names = datasets.ClassLabel(names=["bad", "good"])
    features = {"words": datasets.Value("string"), "verdict": names, "id": datasets.Value("int64")}
    data = datasets.Dataset.from_dict(
        {"words": TWO, "verdict": [1, 1], "id": [4, 5]}, features=datasets.Features(features)
    )
    rows = from_dataset(data)
    assert rows.coding.names == ("bad", "good")
    assert rows.labels.tolist() == [1, 1]
    several = datasets.Features({"text": datasets.Value("string"), "tags": datasets.List(names)})
    data = datasets.Dataset.from_dict({"text": TWO, "tags": [[], [1, 0]]}, features=several)
    assert from_dataset(data).labels.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("columns", "given", "said"),
    [
        (
            {"a": TWO, "b": TWO, "label": [0, 1]},
            {},
            "text_column: expected the column of dataset that holds the text, got none; "
            "its columns are a, b, label",
        ),
        (
            {"text": TWO, "sentence": TWO, "label": [0, 1]},
            {},
            "text_column: expected the column .* its columns are text, sentence, label",
        ),
        (
            {"text": TWO, "x": [0, 1], "y": [0, 1]},
            {},
            "label_column: expected the column of dataset that holds the label, got none; "
            "its columns are text, x, y",
        ),
        ({"text": TWO, "label": [0, 1], "score": [0, 1]}, {}, "label_column"),
        (
            {"text": TWO, "label": [0, 1]},
            {"text": "txt"},
            "text_column: expected a column of dataset, got 'txt'; its columns are text, label",
        ),
        ({"text": TWO, "label": [0, 1]}, {"pair": "two"}, "pair_column: .* got 'two'"),
        ({"text": TWO, "label": [0, 1]}, {"label": "mood"}, "label_column: .* got 'mood'"),
    ],
)
def test_not_clear(columns, given, said):
    with pytest.raises(UsageError, match=said):
        from_dataset(made(**columns), **given)


def test_rows_without_a_text_or_label():
    with pytest.raises(DataError, match="^x row 1: text: expected a text, got None"):
        from_dataset(made(text=["a", None], label=[0, 1]), name="x")
    with pytest.raises(DataError, match="^dataset row 0: n: expected a text, got 3"):
        from_dataset(made(n=[3, 4], label=[0, 1]), text="n")
    with pytest.raises(DataError, match="^x row 1: label: expected a label, got None"):
        from_dataset(made(text=TWO, label=[0, None]), name="x")
    with pytest.raises(DataError, match="x: no rows"):
        from_dataset(made(text=TWO, label=[0, 1]).select([]), name="x")


def test_dev_is_coded_like_train():
    train = from_dataset(made(text=["a", "b", "c"], label=["p", "r", "q"]))
    dev = from_dataset(made(text=TWO, label=["r", "p"]), like=train)
    assert dev.labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="dataset row 1: label: expected one of p, q, r, got 's'"):
        from_dataset(made(text=TWO, label=["r", "s"]), like=train)
