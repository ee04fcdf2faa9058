"""Attention over packed tokens: no padding, and dropout from a counter."""

from sensikernels.ops.varlen_attention.api import explain, varlen_attention

__all__ = ["explain", "varlen_attention"]
