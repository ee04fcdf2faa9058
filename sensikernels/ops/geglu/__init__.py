"""A gated GELU: the first half of the features activated, times the second half."""

from sensikernels.ops.geglu.api import explain, geglu

__all__ = ["explain", "geglu"]
