"""Rows of a task: from files or a folder, from the hub, from Python, or the package itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import DataError, UsageError
from sensikernels.data import demo
from sensikernels.data.columns import Columns, find_columns, from_dataset
from sensikernels.data.held_out import SEED
from sensikernels.data.held_out import held_out as hold_out
from sensikernels.data.kinds import Settled, kind_of
from sensikernels.data.sources import DEV, TRAIN, choose, read_file, read_hub
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
) -> Any:
    """Rows of one split, in file order: ``Examples``, ``Words`` or ``Questions``.

    ``demo`` is generated. GLUE is read from ``data_dir`` (the folder that holds ``SST-2/``,
    ``MRPC/``, …) or, without one, from the hub through ``datasets``; ``ner`` and ``squad`` from
    ``data_dir``. For ``file`` and ``hub:`` tasks see ``load_splits``.

    ``max_samples`` keeps that many rows, drawn without replacement and not stratified. The draw
    depends on ``seed`` alone, and a smaller one is a subset of a larger one.

    Raises UsageError for a wrong argument or a missing ``datasets``; DataError for missing,
    malformed or unreachable data.
    """
    task = get_task(task)
    require_one_of(split, "split", SPLITS)
    require(max_samples is None or max_samples >= 1, "max_samples", "at least 1", max_samples)
    whole = task.source in ("glue", "generated", "folder")
    require(whole, "task", "one with a folder, or load_splits", task.name)
    examples: Any
    if task.source == "generated":
        require(data_dir is None, "data_dir", f"none, as {task.name} is generated", data_dir)
        examples = demo.generate(split)
    elif task.source == "folder":
        held = f"a folder that holds {task.files(split)[0]}"
        if data_dir is None:
            raise UsageError(f"data_dir: expected {held}, got none")
        examples = kind_of(task).read(task, data_dir, split)
    elif data_dir is not None:
        examples = read_split(task, data_dir, split)
    else:
        examples = _from_hub(task, split)
    return _drawn(examples, max_samples, seed)


def _drawn(examples: Any, max_samples: int | None, seed: int) -> Any:
    if max_samples is None or max_samples >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:max_samples]
    return examples.take(np.sort(chosen))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the rows of a task are; what a task has no use for is None.

    ``data_dir``: GLUE's, ``ner``'s or ``squad``'s folder. ``train_file`` and ``dev_file``: CSV,
    TSV, JSON Lines or Parquet. ``columns``: of files, data sets of the hub and given ones.
    ``given``: training and development rows as a mapping, each a ``datasets.Dataset`` or
    ``Examples``.
    """

    data_dir: str | Path | None = None
    train_file: Path | None = None
    dev_file: Path | None = None
    columns: Columns = Columns()
    given: Mapping[str, Any] | None = None


def load_splits(
    task: str | Task,
    places: Places,
    *,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
) -> Settled:
    """Both splits of any task, and the task with what its rows say: labels and metrics.

    ``max_train_samples`` training rows are drawn as in ``load``, ``max_eval_samples`` development
    rows likewise, the same ones for every ``seed``; labels are those of all rows.
    ``held_out`` training rows take the development rows' place, to choose settings by.
    Raises UsageError and DataError as ``load`` and ``from_dataset`` do.
    """
    task = get_task(task)
    notes: tuple[str, ...] = ()
    train: Any
    dev: Any
    if task.source in ("glue", "generated", "folder"):
        train = load(task, data_dir=places.data_dir, split="train")
        dev = load(task, data_dir=places.data_dir, split="dev")
    elif task.source == "files":
        assert places.train_file is not None
        assert places.dev_file is not None
        files = (places.train_file, places.dev_file)
        train, dev = _examples([read_file(f) for f in files], places.columns, list(map(str, files)))
    elif task.source == "hub":
        held, other, notes = read_hub(task.name)
        names = [f"{task.name} {split}" for split in ("train", "dev")]
        train, dev = _examples([held, other], places.columns, names)
    else:
        train, dev = _given(task, places)
    settled = kind_of(task).settle(task, train, dev)
    notes = (*notes, *settled.notes)
    if held_out is None:
        chosen = _drawn(settled.train, max_train_samples, seed)
        scored = _drawn(settled.dev, max_eval_samples, SEED)
        return replace(settled, train=chosen, dev=scored, notes=notes)
    kept, held = hold_out(kind_of(task), settled.train, held_out, max_train_samples, seed)
    return replace(settled, train=kept, dev=held, notes=(*notes, f"held out: {len(held):,} rows"))


def _examples(splits: list[Any], columns: Columns, names: list[str]) -> tuple[Examples, Examples]:
    """Both splits, by the columns found in the first and labels coded like its."""
    named = vars(find_columns(splits[0], columns, names[0]))
    train = from_dataset(splits[0], **named, name=names[0])
    return train, from_dataset(splits[1], **named, name=names[1], like=train)


def _given(task: Task, places: Places) -> tuple[Examples, Examples]:
    if places.given is None:
        raise UsageError(
            f"task: expected finetune(settings, data=…) in Python for {task.name}, got no data"
        )
    names = [choose(places.given, wanted, "data") for wanted in (TRAIN, DEV)]
    splits = [places.given[name] for name in names]
    ours = [isinstance(split, Examples) for split in splits]
    require(all(ours) or not any(ours), "data", "splits of one class", "Examples and others")
    if all(ours):
        return splits[0], splits[1]
    for name, split in zip(names, splits, strict=True):
        known = hasattr(split, "features") and hasattr(split, "__len__")
        require(known, f"data[{name!r}]", "a datasets.Dataset or Examples", type(split).__name__)
    return _examples(splits, places.columns, [f"data[{name!r}]" for name in names])


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
