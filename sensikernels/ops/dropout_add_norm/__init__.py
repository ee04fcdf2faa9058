"""LayerNorm(residual + dropout(x)), forward and backward in one pass each."""

from sensikernels.ops.dropout_add_norm.api import dropout_add_norm, explain

__all__ = ["dropout_add_norm", "explain"]
