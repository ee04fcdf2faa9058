"""Rotary position embeddings of the heads of packed tokens."""

from sensikernels.ops.rotary.api import explain, rotary

__all__ = ["explain", "rotary"]
