"""Dropout from a counter: the mask is drawn anew in backward, never stored."""

from sensikernels.ops.dropout.api import dropout, explain

__all__ = ["dropout", "explain"]
