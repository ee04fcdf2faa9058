"""Linear with a weight mask: forward and backward cost what is kept."""

from sensikernels.ops.masked_linear.api import masked_linear
from sensikernels.ops.masked_linear.checks import ACTIVATIONS
from sensikernels.ops.masked_linear.dispatch import explain
from sensikernels.ops.masked_linear.take_kept import take_kept

__all__ = ["ACTIVATIONS", "explain", "masked_linear", "take_kept"]
