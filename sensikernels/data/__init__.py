"""Tasks, data, metrics and batches for fine-tuning on GLUE, and a generated demo task."""

from __future__ import annotations

from sensikernels.data.batching import Batches, collate, geometry
from sensikernels.data.embedded import embedded_model_path
from sensikernels.data.load import load
from sensikernels.data.metrics import compute
from sensikernels.data.packing import DataCollatorPacked, collate_packed
from sensikernels.data.rows import Encoded, encode
from sensikernels.data.sampling import LengthBucketSampler, TokenBudgetSampler
from sensikernels.data.tasks import TASKS, Task, get_task
from sensikernels.data.tsv import Examples

__all__ = [
    "TASKS",
    "Batches",
    "DataCollatorPacked",
    "Encoded",
    "Examples",
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
