"""Tasks, data, metrics and batches for fine-tuning on GLUE, and a generated demo task."""

from __future__ import annotations

from sensikernels.glue.batching import (
    Batches,
    Encoded,
    Geometry,
    LengthBucketSampler,
    collate,
    encode,
    geometry,
)
from sensikernels.glue.embedded import embedded_model_path
from sensikernels.glue.load import load
from sensikernels.glue.metrics import compute
from sensikernels.glue.tasks import TASKS, Task, get_task
from sensikernels.glue.tsv import Examples

__all__ = [
    "TASKS",
    "Batches",
    "Encoded",
    "Examples",
    "Geometry",
    "LengthBucketSampler",
    "Task",
    "collate",
    "compute",
    "embedded_model_path",
    "encode",
    "geometry",
    "get_task",
    "load",
]
