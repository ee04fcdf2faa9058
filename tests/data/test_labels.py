"""What labels are is told from themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sensikernels._core.errors import DataError
from sensikernels.data.labels import infer, of_array


def where(row):
    return f"rows:{row}"


@pytest.mark.parametrize(
    ("labels", "problem", "names", "coded"),
    [
        ([2, 0, 2], "classes", ("0", "2"), [1, 0, 1]),
        (["b", "a", "b"], "classes", ("a", "b"), [1, 0, 1]),
        ([10, 9, -1], "classes", ("-1", "9", "10"), [2, 1, 0]),
        ([True, False], "classes", ("False", "True"), [1, 0]),
        ([0.5, 1.0], "scores", (), [0.5, 1.0]),
        ([1.5, 2], "scores", (), [1.5, 2.0]),
        ([["x"], [], ["y", "x"]], "several", ("x", "y"), [[1, 0], [0, 0], [1, 1]]),
        ([[1, 0, 0], [1, 1, 0]], "several", ("0", "1", "2"), [[1, 0, 0], [1, 1, 0]]),
        ([[0.0, 1.0], [True, False]], "several", ("0", "1"), [[0, 1], [1, 0]]),
    ],
)
def test_inferred(labels, problem, names, coded):
    found = infer(labels, where)
    assert (found.problem, found.names) == (problem, names)
    made = found.encode(labels, where)
    assert made.tolist() == coded
    assert made.dtype == (np.int64 if problem == "classes" else np.float32)


def test_names_of_a_feature():
    classes = infer([1, 1], where, ["bad", "good"])
    assert (classes.problem, classes.names) == ("classes", ("bad", "good"))
    assert classes.encode([0, 1], where).tolist() == [0, 1]
    with pytest.raises(DataError, match=r"^rows:1: expected one of 0, 1, got -1"):
        classes.encode([0, -1], where)
    several = infer([[0], [2, 0]], where, ["a", "b", "c"])
    assert several.problem == "several"
    assert several.encode([[0], [2, 0], []], where).tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", None], "rows:1: expected a label, got None"),
        (["a", ""], "rows:1: expected a label, got ''"),
        ([0.5, math.nan], "rows:1: expected a label, got nan"),
        ([1, "a"], "rows:1: expected a number as in the first row, got 'a'"),
        ([True, 1], "rows:1: expected a boolean as in the first row, got 1"),
        ([1, 1], "rows:0: expected at least two classes, got 1 alone"),
        ([["a"], "a"], "rows:1: expected a list of labels, got 'a'"),
        ([[1, 0], [1]], "rows:1: expected lists of names, or 0/1 vectors of one length"),
        ([[1, 0], [2, 0]], "rows:1: expected lists of names, or 0/1 vectors"),
        ([["a"], [1]], "rows:0: expected lists of names, or 0/1 vectors"),
        ([[], []], "rows:0: expected lists of names, or 0/1 vectors"),
        ([{"a": 1}], "rows:0: expected a label"),
    ],
)
def test_no_labels(labels, said):
    with pytest.raises(DataError, match=said):
        infer(labels, where)


@pytest.mark.parametrize(
    ("train", "dev", "said"),
    [
        (["a", "b"], ["c"], "rows:0: expected one of a, b, got 'c'"),
        ([0, 1], [0, 2], "rows:1: expected one of 0, 1, got 2"),
        ([0, 1], [1.0], "got 1.0"),
        ([0, 1], [True], "got True"),
        ([0, 1], [[1]], r"got \[1\]"),
        ([0.5], ["x"], "rows:0: expected a finite number, got 'x'"),
        ([0.5], [math.inf], "expected a finite number, got inf"),
        ([["a"], ["b"]], [["c"]], "expected one of a, b, got 'c'"),
        ([["a"], ["b"]], ["a"], "expected a list of labels, got 'a'"),
        ([[1, 0]], [[1]], "expected a vector of 2 zeros and ones"),
        ([[1, 0]], [[1, 3]], "expected a vector of 2 zeros and ones"),
        (list(range(20)), [20], r"expected one of 0, 1, .*, 7 … \(20\), got 20"),
    ],
)
def test_other_labels_in_dev(train, dev, said):
    with pytest.raises(DataError, match=said):
        infer(train, where).encode(dev, where)


def test_said_in_a_line():
    assert str(infer(["b", "a"], where)) == "2 classes: a, b"
    assert str(infer([0.5], where)) == "scores (regression)"
    assert str(infer([["b"], ["a"]], where)) == "2 labels, several a row (multi-label): a, b"
    assert str(infer(list(range(10)), where)) == "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, …"


def test_numbers_that_are_arrays_already():
    assert of_array(np.asarray([0, 2]), where).names == ("0", "1", "2")
    assert of_array(np.asarray([0.5], np.float32), where).problem == "scores"
    assert of_array(np.asarray([[0, 1]], np.float32), where).problem == "several"
    with pytest.raises(DataError, match="expected classes 0, 1, …, got -1 to 1"):
        of_array(np.asarray([-1, 1]), where)
