from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.data import TASKS, compute


def logits_for(predicted, classes=2):
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes) * 3.0 - 1.0


TRUTH = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1])
GUESS = [1, 1, 0, 0, 1, 1, 0, 1]  # tp 4, fn 1, fp 1, tn 2


def test_accuracy_and_f1():
    assert compute("mrpc", logits_for(GUESS), TRUTH) == {
        "f1": pytest.approx(8 / 10),
        "accuracy": pytest.approx(6 / 8),
    }
    assert compute("sst2", logits_for(GUESS), TRUTH) == {"accuracy": 0.75}


def test_matthews():
    expected = (4 * 2 - 1 * 1) / np.sqrt(5 * 5 * 3 * 3)
    assert compute("cola", logits_for(GUESS), TRUTH)["matthews"] == pytest.approx(expected)


def test_three_classes():
    assert compute("mnli", logits_for([2, 1, 0, 0], 3), torch.tensor([2, 1, 0, 1])) == {
        "accuracy": 0.75
    }


def test_correlations_against_their_definitions():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 5, 60)
    guess = truth + rng.normal(size=60)
    got = compute("stsb", guess[:, None], truth)
    pearson = np.corrcoef(truth, guess)[0, 1]
    spearman = np.corrcoef(truth.argsort().argsort(), guess.argsort().argsort())[0, 1]
    assert got == {"spearman": pytest.approx(spearman), "pearson": pytest.approx(pearson)}
    assert list(got) == ["spearman", "pearson"]
    assert compute("stsb", torch.from_numpy(guess), torch.from_numpy(truth)) == pytest.approx(got)


def test_bfloat16_logits():
    assert compute("sst2", logits_for(GUESS).bfloat16(), TRUTH)["accuracy"] == 0.75


@pytest.mark.filterwarnings("error")
def test_a_constant_guess_scores_zero():
    zeros = [0] * 8
    assert compute("mrpc", logits_for(zeros), TRUTH)["f1"] == 0.0
    assert compute("cola", logits_for(zeros), TRUTH)["matthews"] == 0.0
    assert compute("stsb", torch.ones(8, 1), TRUTH.float()) == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(bad):
    logits = logits_for(GUESS)
    logits[3, 1] = bad
    with pytest.raises(SensiError, match="got 1 of 8 rows that are not: training diverged"):
        compute("sst2", logits, TRUTH)


@pytest.mark.parametrize("shape", [(8, 3), (7, 2), (8,), (8, 2, 1)])
def test_wrong_shape(shape):
    with pytest.raises(UsageError, match=r"logits: expected shape \(8, 2\), got \("):
        compute("sst2", torch.zeros(shape), TRUTH)


def test_no_rows():
    with pytest.raises(UsageError, match="labels: expected at least one row"):
        compute("sst2", torch.zeros(0, 2), torch.zeros(0))


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UsageError, match=r"pip install 'sensikernels\[glue\]'"):
        compute(TASKS["sst2"], logits_for(GUESS), TRUTH)
