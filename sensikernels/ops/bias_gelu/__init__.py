"""Exact GELU of ``x + bias``; its derivative and the bias gradient in one pass."""

from sensikernels.ops.bias_gelu.api import bias_gelu, explain

__all__ = ["bias_gelu", "explain"]
