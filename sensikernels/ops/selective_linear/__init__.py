"""Linear with an update mask: dense forward, gradient of the kept weight entries only."""

from sensikernels.ops.selective_linear.api import ACTIVATIONS, selective_linear
from sensikernels.ops.selective_linear.dispatch import explain

__all__ = ["ACTIVATIONS", "explain", "selective_linear"]
