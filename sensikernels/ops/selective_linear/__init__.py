"""Linear with an update mask: dense forward, gradient of the kept weight entries only."""

from sensikernels.ops.selective_linear.api import selective_linear
from sensikernels.ops.selective_linear.checks import ACTIVATIONS
from sensikernels.ops.selective_linear.dispatch import explain
from sensikernels.ops.selective_linear.grouped import Selected, selective_linear_grouped, why_apart

__all__ = [
    "ACTIVATIONS",
    "Selected",
    "explain",
    "selective_linear",
    "selective_linear_grouped",
    "why_apart",
]
