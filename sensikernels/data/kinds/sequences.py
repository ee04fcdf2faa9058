"""Texts and pairs of texts with a class, a score, or any number of labels."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensikernels.data import labels as coding
from sensikernels.data.kinds.base import Cut, Kind, Order, Settled, inverse
from sensikernels.data.metrics import Array, as_array, score_labels
from sensikernels.data.rows import Encoded, encode
from sensikernels.data.tasks import Split, Task
from sensikernels.data.tsv import Examples, read_split

_METRICS = {
    "scores": ("pearson", "spearman"),
    "several": ("micro_f1", "macro_f1"),
    "classes": ("accuracy", "macro_f1"),
}


class Sequences(Kind):
    """GLUE's tasks, the demo, and columns of any data."""

    suffixes = (".tsv", ".jsonl")

    def read(self, task: Task, data_dir: str | Path, split: Split) -> Examples:
        return read_split(task, data_dir, split)

    def texts(self, rows: Examples) -> list[tuple[str, ...]]:
        columns = [c for c in (rows.texts_a, rows.texts_b) if c is not None]
        return list(zip(*columns, strict=True))

    def settle(self, task: Task, train: Examples, dev: Examples) -> Settled:
        if task.source in ("glue", "generated"):
            return Settled(task=task, train=train, dev=dev)
        found = train.coding or coding.of_array(train.labels, lambda row: f"train row {row}: label")
        if dev.coding is not None and dev.coding != found:
            dev = replace(dev, labels=_recoded(dev, found), coding=found)
        elif dev.coding is None:
            made = found.encode(dev.labels.tolist(), lambda row: f"dev row {row}: label")
            dev = replace(dev, labels=made)
        binary = found.problem == "classes" and len(found.names) == 2
        settled = replace(
            task,
            metrics=("accuracy", "f1") if binary else _METRICS[found.problem],
            label_names=found.names,
            multi_label=found.problem == "several",
            label_range=(-math.inf, math.inf) if found.problem == "scores" else None,
        )
        return Settled(task=settled, train=train, dev=dev, notes=(f"labels: {found}",))

    def encode(
        self, task: Task, rows: Examples, tokenizer: Any, cut: Cut, *, train: bool
    ) -> Encoded:
        return encode(rows, tokenizer, max_length=cut.max_length)

    def score(self, task: Task, outputs: Any, truth: Any) -> dict[str, float]:
        return score_labels(task, outputs, truth)

    def sample(self, task: Task) -> tuple[Any, Any]:
        shape = (2, task.num_labels) if task.multi_label else (2,)
        dtype = torch.float32 if task.regression or task.multi_label else torch.int64
        return torch.zeros(2, task.num_labels), torch.zeros(shape, dtype=dtype)

    def predictions(self, task: Task, outputs: Any, truth: Any, order: Order, suffix: str) -> str:
        """A line a row: its number, label and prediction, and a probability for every name."""
        rows = list(_rows(task, as_array(outputs), as_array(truth), inverse(order)))
        if suffix == ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        made = io.StringIO()
        table = csv.writer(made, delimiter="\t", lineterminator="\n")
        head = [name for name in rows[0] if name != "probabilities"]
        table.writerow([*head, *task.label_names])
        for row in rows:
            plain = [",".join(v) if isinstance(v, list) else v for v in map(row.get, head)]
            table.writerow([*plain, *row.get("probabilities", {}).values()])
        return made.getvalue()


def _rows(task: Task, logits: Array, truth: Array, places: Order) -> Iterator[dict[str, Any]]:
    names = task.label_names
    for row, at in enumerate(places.tolist()):
        if task.regression:
            yield {"row": row, "label": float(truth[at]), "score": float(logits[at].reshape(()))}
            continue
        if task.multi_label:
            probabilities = 1 / (1 + np.exp(-logits[at]))
            label: Any = [n for n, one in zip(names, truth[at], strict=True) if one]
            predicted: Any = [n for n, x in zip(names, logits[at], strict=True) if x >= 0]
        else:
            powers = np.exp(logits[at] - logits[at].max())
            probabilities = powers / powers.sum()
            label, predicted = names[int(truth[at])], names[int(logits[at].argmax())]
        shares = dict(zip(names, map(float, probabilities), strict=True))
        yield {"row": row, "label": label, "prediction": predicted, "probabilities": shares}


def _recoded(dev: Examples, found: coding.Coding) -> Array:
    """The labels of ``dev`` as ``found`` numbers them."""
    own = dev.coding
    assert own is not None
    known: list[Any] = dev.labels.tolist()
    if own.problem == "classes":
        known = [own.values[i] for i in known]
    elif own.problem == "several" and not own.vectors:
        known = [[v for v, one in zip(own.values, row, strict=True) if one] for row in known]
    return found.encode(known, lambda row: f"dev row {row}: label")
