"""Tasks, data, metrics and batches for fine-tuning: GLUE, a generated demo, and data of users."""

from __future__ import annotations

from sensikernels.data.batching import Batches, collate, geometry
from sensikernels.data.columns import Columns, from_dataset
from sensikernels.data.embedded import embedded_model_path
from sensikernels.data.kinds import compute, kind_of
from sensikernels.data.load import Places, load, load_splits
from sensikernels.data.packing import DataCollatorPacked, collate_packed
from sensikernels.data.rows import Encoded, encode
from sensikernels.data.sampling import LengthBucketSampler, TokenBudgetSampler
from sensikernels.data.tasks import FORMS, TASKS, Task, get_task
from sensikernels.data.tsv import Examples

__all__ = [
    "FORMS",
    "TASKS",
    "Batches",
    "Columns",
    "DataCollatorPacked",
    "Encoded",
    "Examples",
    "LengthBucketSampler",
    "Places",
    "Task",
    "TokenBudgetSampler",
    "collate",
    "collate_packed",
    "compute",
    "embedded_model_path",
    "encode",
    "from_dataset",
    "geometry",
    "get_task",
    "kind_of",
    "load",
    "load_splits",
]
