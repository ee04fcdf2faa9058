"""Sums of weights and gradients over groups, for all tensors of a model in one pass."""

from sensikernels.ops.group_reduce.api import GroupSums, explain, group_reduce
from sensikernels.ops.group_reduce.per_sample import per_sample_grad_squared
from sensikernels.ops.group_reduce.table import STATISTICS, GroupTable

__all__ = [
    "STATISTICS",
    "GroupSums",
    "GroupTable",
    "explain",
    "group_reduce",
    "per_sample_grad_squared",
]
