"""``bias_gelu``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.bias_gelu import reference
from sensikernels.ops.bias_gelu.autograd import BiasGelu
from sensikernels.ops.bias_gelu.checks import check
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.rowwise import choice, serving


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """GELU of ``x + bias``, exact: ``z Φ(z)``, never the tanh form (Hendrycks & Gimpel, 2016).

    The sum is taken in float32 and not rounded. Saved for backward: ``x``, nothing else of its
    size. The bias gradient is summed in the pass that takes the derivative, in float32 and in an
    order that does not depend on the number of threads.

    Args:
        x: ``[..., width]``, a floating dtype; under autocast it keeps its dtype.
        bias: ``[width]``, any floating dtype; None adds nothing.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        As ``x``; once differentiable (the reference to any order).

    Raises:
        UsageError: shapes, dtypes or devices do not fit, or a backend that cannot serve.
    """
    check(x, bias)
    chosen = serving(x, backend)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.bias_gelu(x, bias)
    out: Tensor = BiasGelu.apply(x, bias, chosen)  # type: ignore[no-untyped-call]
    return out


def explain(x: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``x``, and why; UsageError for a named one that cannot."""
    return choice(x, backend)
