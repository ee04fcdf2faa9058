"""Rows of a task: from a folder, from the hub, or from the package itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import DataError, UsageError
from sensikernels.data import demo
from sensikernels.data.tasks import SPLITS, Split, Task, get_task
from sensikernels.data.tsv import Examples, read_split

HUB_REPOSITORY = "nyu-mll/glue"


def load(
    task: str | Task,
    *,
    data_dir: str | Path | None = None,
    split: Split,
    max_samples: int | None = None,
    seed: int = 0,
) -> Examples:
    """Rows of one split, in file order.

    ``demo`` is generated. Any other task is read from ``data_dir`` (the folder that holds
    ``SST-2/``, ``MRPC/``, …) or, without one, from the hub through ``datasets``.

    ``max_samples`` keeps that many rows, drawn without replacement and not stratified. The draw
    depends on ``seed`` alone, and a smaller one is a subset of a larger one.

    Raises UsageError for a wrong argument or a missing ``datasets``; DataError for missing,
    malformed or unreachable data.
    """
    task = get_task(task)
    require_one_of(split, "split", SPLITS)
    require(max_samples is None or max_samples >= 1, "max_samples", "at least 1", max_samples)
    if task.folder is None:
        require(data_dir is None, "data_dir", f"none, as {task.name} is generated", data_dir)
        examples = demo.generate(split)
    elif data_dir is not None:
        examples = read_split(task, data_dir, split)
    else:
        examples = _from_hub(task, split)
    if max_samples is None or max_samples >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:max_samples]
    return examples.take(np.sort(chosen))


def _from_hub(task: Task, split: Split) -> Examples:
    try:  # optional: its absence is told with what to install
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(
            f"data_dir: expected a folder that holds {task.folder}/, got none, and the hub needs "
            "the datasets package: pip install 'sensikernels[glue]'"
        ) from error
    name = "train" if split == "train" else task.hub_dev
    try:
        rows = datasets.load_dataset(HUB_REPOSITORY, task.hub_config, split=name)
    except Exception as error:  # offline, not found, a broken cache, or its format is another
        raise DataError(
            f"{HUB_REPOSITORY} ({task.hub_config}, {name}): cannot be fetched: "
            f"{' '.join(str(error).split())}; give a folder with --data-dir instead"
        ) from error
    return _hub_examples(task, rows)


def _hub_examples(task: Task, rows: Any) -> Examples:
    columns = task.hub_texts or task.texts
    labels: npt.NDArray[Any] = np.asarray(
        list(rows["label"]), dtype=np.float32 if task.regression else np.int64
    )
    low, high = task.label_range or (0, task.num_labels - 1)
    outside = np.flatnonzero((labels < low) | (labels > high))
    if outside.size:
        row = int(outside[0])
        raise DataError(
            f"{HUB_REPOSITORY} ({task.hub_config}) row {row}: label: "
            f"expected {low:g}..{high:g}, got {labels[row]}"
        )
    texts = [list(rows[column]) for column in columns]
    return Examples(texts_a=texts[0], texts_b=texts[1] if len(texts) == 2 else None, labels=labels)
