from __future__ import annotations

import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from sensikernels._core.errors import DataError, UsageError
from sensikernels.data import TASKS, load
from tests.data.layout import line, lines, write

# Rows of the real files in circulation; QNLI train, QQP and MNLI as samples.
SIZES = {
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "qnli": (9999, 5463),
    "qqp": (20000, 3496),
    "mnli": (8999, 1000),
    "wnli": (635, 71),
}


@pytest.fixture
def hundred(tmp_path):
    task = TASKS["sst2"]
    write(tmp_path, task, "train", ["sentence\tlabel", *(f"row {i}\t{i % 2}" for i in range(100))])
    return tmp_path


def test_all_rows_in_file_order(hundred):
    rows = load("sst2", data_dir=hundred, split="train")
    assert list(rows.texts_a) == [f"row {i}" for i in range(100)]


def test_subsample_is_a_function_of_the_seed(hundred):
    def draw(samples, seed):
        rows = load("sst2", data_dir=hundred, split="train", max_samples=samples, seed=seed)
        assert len(rows) == len(set(rows.texts_a)) == samples
        numbers = [int(text.split()[1]) for text in rows.texts_a]
        assert numbers == sorted(numbers)
        assert rows.labels.tolist() == [i % 2 for i in numbers]
        return set(numbers)

    assert draw(30, 1) == draw(30, 1)
    assert draw(30, 1) != draw(30, 2)
    assert draw(10, 1) < draw(30, 1)


def test_more_samples_than_rows_gives_all(hundred):
    assert len(load("sst2", data_dir=hundred, split="train", max_samples=1000)) == 100


@pytest.mark.parametrize("samples", [0, -1])
def test_max_samples_below_one(hundred, samples):
    with pytest.raises(UsageError, match="max_samples: expected at least 1, got"):
        load("sst2", data_dir=hundred, split="train", max_samples=samples)


def test_pairs_are_subsampled_together(tmp_path):
    task = TASKS["rte"]
    text = [lines(task)[0], *(line(task, "entailment", f"a {i}", f"b {i}") for i in range(50))]
    write(tmp_path, task, "train", text)
    rows = load("rte", data_dir=tmp_path, split="train", max_samples=20)
    assert [a[2:] for a in rows.texts_a] == [b[2:] for b in rows.texts_b]


def test_unknown_task_and_split(hundred):
    with pytest.raises(UsageError, match="task: expected one of"):
        load("imdb", data_dir=hundred, split="train")
    with pytest.raises(UsageError, match="split: expected one of dev, train, got 'test'"):
        load("sst2", data_dir=hundred, split="test")


def test_demo_takes_no_folder(tmp_path):
    with pytest.raises(UsageError, match="data_dir: expected none"):
        load("demo", data_dir=tmp_path, split="dev")


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"data_dir: .* pip install 'sensikernels\[glue\]'"):
        load("rte", split="dev")


def hub(monkeypatch, answer):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs["split"]))
        return answer()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


class Hub:
    NAMES: ClassVar = {
        "mrpc": ("sentence1", "sentence2"),
        "mnli": ("premise", "hypothesis"),
        "qnli": ("question", "sentence"),
        "qqp": ("question1", "question2"),
        "sst2": ("sentence",),
        "cola": ("sentence",),
    }
    SPLITS: ClassVar = {"mnli": "validation_matched", "mnli-mm": "validation_mismatched"}


def test_hub_columns_and_splits(monkeypatch, glue_task):
    names = Hub.NAMES.get(glue_task.hub_config, ("sentence1", "sentence2"))
    table = {name: [f"{name} {i}" for i in range(2)] for name in names} | {"label": [1, 0]}
    calls = hub(monkeypatch, lambda: table)
    rows = load(glue_task, split="dev")
    load(glue_task, split="train")
    dev = Hub.SPLITS.get(glue_task.name, "validation")
    assert calls == [("nyu-mll/glue", glue_task.hub_config, s) for s in (dev, "train")]
    assert rows.texts_a == table[names[0]]
    assert rows.texts_b == (table[names[1]] if len(names) == 2 else None)
    assert rows.labels.tolist() == [1, 0]
    assert rows.labels.dtype == (np.float32 if glue_task.regression else np.int64)


def test_hub_without_labels(monkeypatch):
    hub(monkeypatch, lambda: {"sentence": ["a", "b"], "label": [0, -1]})
    with pytest.raises(DataError, match=r"row 1: label: expected 0\.\.1, got -1"):
        load("sst2", split="dev")


def test_unreachable_hub_is_one_line(monkeypatch):
    def fail():
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, fail)
    with pytest.raises(DataError, match="cannot be fetched: no route to host; give a folder") as e:
        load("sst2", split="dev")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", SIZES)
def test_real_files(glue_data_dir, name):
    if not (glue_data_dir / str(TASKS[name].folder)).is_dir():
        pytest.skip(f"{glue_data_dir} holds no {TASKS[name].folder}/")
    for split, rows in zip(("train", "dev"), SIZES[name], strict=True):
        examples = load(name, data_dir=glue_data_dir, split=split)
        assert len(examples) == len(examples.labels) == rows
        assert all(examples.texts_a)
        if name != "stsb":
            assert set(examples.labels.tolist()) == set(range(TASKS[name].num_labels))
