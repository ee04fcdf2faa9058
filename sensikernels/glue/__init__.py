"""Tasks, data, metrics and batches for fine-tuning on GLUE, and a generated demo task."""

from __future__ import annotations

from sensikernels.glue.batching import (
    Batches,
    Encoded,
    Geometry,
    collate,
    encode,
    geometry,
)
from sensikernels.glue.embedded import embedded_model_path
from sensikernels.glue.load import load
from sensikernels.glue.metrics import compute
from sensikernels.glue.packing import DataCollatorPacked, collate_packed
from sensikernels.glue.sampling import LengthBucketSampler, TokenBudgetSampler
from sensikernels.glue.tasks import TASKS, Task, get_task
from sensikernels.glue.tsv import Examples

__all__ = [
    "TASKS",
    "Batches",
    "DataCollatorPacked",
    "Encoded",
    "Examples",
    "Geometry",
    "LengthBucketSampler",
    "Task",
    "TokenBudgetSampler",
    "collate",
    "collate_packed",
    "compute",
    "embedded_model_path",
    "encode",
    "geometry",
    "get_task",
    "load",
]
