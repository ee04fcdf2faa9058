"""Results of the compiled kernels are NaN until written, as torch's own are in this suite."""

from __future__ import annotations

from tests.ops.linear_cases import poison_native

__all__ = ["poison_native"]
