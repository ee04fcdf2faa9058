"""Metrics of texts' labels, as shares: 0..1, and -1..1 for the three correlations. Never points."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from sensikernels._core.checks import require
from sensikernels._core.errors import SensiError, UsageError
from sensikernels.data.tasks import Task

Array = npt.NDArray[Any]


def score_labels(
    task: Task, logits: torch.Tensor | Array, labels: torch.Tensor | Array
) -> dict[str, float]:
    """The task's metrics by name, the main one first.

    ``logits`` is ``[rows, num_labels]`` (regression: ``[rows]`` or ``[rows, 1]``), ``labels`` is
    ``[rows]``, or ``[rows, num_labels]`` for several labels a row, which are predicted where their
    probability is at least 0.5. F1 is that of class 1. A correlation with a constant is undefined;
    it is reported as 0. Raises UsageError on a wrong shape, SensiError on logits that are not
    finite.
    """
    scores, truth = as_array(logits), as_array(labels)
    truth = truth if task.multi_label else truth.reshape(-1)
    rows = len(truth)
    require(rows > 0, "labels", "at least one row", "none")
    shapes = [(rows, 1), (rows,)] if task.regression else [(rows, task.num_labels)]
    expected = " or ".join(map(str, shapes))
    require(scores.shape in shapes, "logits", f"shape {expected}", scores.shape)
    require_finite(scores.reshape(rows, -1))
    predicted = scores.reshape(-1) if task.regression else scores.argmax(axis=1)
    if task.multi_label:
        require(truth.shape == scores.shape, "labels", f"shape {scores.shape}", truth.shape)
        truth, predicted = truth.astype(np.int64), (scores >= 0).astype(np.int64)
    return {name: METRICS[name](truth, predicted) for name in task.metrics}


def require_finite(scores: Array) -> None:
    """Raise SensiError, with their number, for rows of scores that are not finite."""
    finite = np.asarray(np.isfinite(scores).all(axis=1))
    if not finite.all():
        raise SensiError(
            f"logits: expected finite values, got {len(finite) - int(finite.sum())} of "
            f"{len(finite)} rows that are not: training diverged"
        )


def as_array(values: torch.Tensor | Array) -> Array:
    """On the host; floats as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def library(module: str) -> Any:
    """An optional module. Raises UsageError: it is not installed."""
    try:  # optional: its absence is told with what to install
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"metrics: expected {module} installed, got none: pip install 'sensikernels[glue]'"
        ) from error


def _accuracy(truth: Array, predicted: Array) -> float:
    return float(library("sklearn.metrics").accuracy_score(truth, predicted))


def _f1(truth: Array, predicted: Array) -> float:
    return float(library("sklearn.metrics").f1_score(truth, predicted, zero_division=0))


def _macro_f1(truth: Array, predicted: Array) -> float:
    score = library("sklearn.metrics").f1_score
    return float(score(truth, predicted, average="macro", zero_division=0))


def _micro_f1(truth: Array, predicted: Array) -> float:
    score = library("sklearn.metrics").f1_score
    return float(score(truth, predicted, average="micro", zero_division=0))


def _matthews(truth: Array, predicted: Array) -> float:
    return float(library("sklearn.metrics").matthews_corrcoef(truth, predicted))


def _pearson(truth: Array, predicted: Array) -> float:
    return _correlation("pearsonr", truth, predicted)


def _spearman(truth: Array, predicted: Array) -> float:
    return _correlation("spearmanr", truth, predicted)


def _correlation(function: str, truth: Array, predicted: Array) -> float:
    if np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(getattr(library("scipy.stats"), function)(truth, predicted).statistic)


METRICS: Final[dict[str, Callable[[Array, Array], float]]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "micro_f1": _micro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
