"""The kinds of tasks, a module each: what is labelled decides how rows are read and scored."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from sensikernels.data.kinds.answers import Answers
from sensikernels.data.kinds.base import Cut, Kind, Rows, Settled
from sensikernels.data.kinds.sequences import Sequences
from sensikernels.data.kinds.tokens import Tokens
from sensikernels.data.tasks import Task, get_task

__all__ = ["KINDS", "Cut", "Kind", "Rows", "Settled", "compute", "kind_of"]

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {"sequences": Sequences(), "tokens": Tokens(), "answers": Answers()}
)


def kind_of(task: Task) -> Kind:
    """The kind of a task."""
    return KINDS[task.kind]


def compute(task: str | Task, outputs: Any, truth: Any) -> dict[str, float]:
    """The task's metrics by name, the main one first; as its kind's ``score``.

    For texts ``outputs`` are logits ``[rows, num_labels]`` (regression: ``[rows]`` or
    ``[rows, 1]``), ``truth`` labels ``[rows]``, or ``[rows, num_labels]`` for several a row.
    """
    task = get_task(task)
    return kind_of(task).score(task, outputs, truth)
