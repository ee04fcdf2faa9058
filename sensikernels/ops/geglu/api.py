"""``geglu``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.rowwise import choice, serving
from sensikernels.ops.geglu import reference
from sensikernels.ops.geglu.autograd import Geglu
from sensikernels.ops.geglu.checks import check


def geglu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``gelu(a) · b`` of the halves a and b of ``x + bias`` (Shazeer, 2020, arXiv:2002.05202).

    The first half is activated, as in transformers' ModernBERT, by the exact GELU ``z Φ(z)``. All
    is taken in float32 and rounded once. Saved for backward: ``x``, nothing else of its size. The
    bias gradient is summed in the pass that takes the derivative, in float32 and in an order that
    does not depend on the number of threads.

    Args:
        x: ``[..., 2 n]``, a floating dtype; under autocast it keeps its dtype.
        bias: ``[2 n]``, any floating dtype; None adds nothing.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``[..., n]`` in x's dtype; once differentiable (the reference to any order).

    Raises:
        UsageError: the last dimension is odd, shapes, dtypes or devices do not fit, or a backend
            that cannot serve.
    """
    check(x, bias)
    chosen = serving(x, backend)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.geglu(x, bias)
    out: Tensor = Geglu.apply(x, bias, chosen)  # type: ignore[no-untyped-call]
    return out


def explain(x: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``x``, and why; UsageError for a named one that cannot."""
    return choice(x, backend)
