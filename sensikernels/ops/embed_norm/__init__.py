"""Three embeddings, their sum, LayerNorm and dropout in one pass; backward likewise."""

from sensikernels.ops.embed_norm.api import embed_norm, explain

__all__ = ["embed_norm", "explain"]
