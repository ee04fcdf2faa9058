"""``rotary``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.rowwise import choice, serving
from sensikernels.ops.rotary import reference
from sensikernels.ops.rotary.autograd import Rotary
from sensikernels.ops.rotary.checks import check


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Each pair of a head turned by its token's angle (Su et al., 2021, arXiv:2104.09864).

    With the halves x1 and x2 of the last dimension the result is
    ``(x1 cos - x2 sin, x2 cos + x1 sin)``, as by transformers' ``rotate_half``, whose cos and sin
    hold these columns twice. Taken in float32 and rounded once. The gradient is turned back.

    Args:
        x: ``[tokens, heads, size]``, a floating dtype, size even; under autocast it keeps its
            dtype. Slices of a fused projection (any token and head stride) are read in place.
        cos, sin: ``[tokens, size // 2]``, float32 or x's dtype, without gradients.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``[tokens, heads, size]``, contiguous, in x's dtype; differentiable in ``x`` to any order.

    Raises:
        UsageError: the size is odd, shapes, dtypes or devices do not fit, cos or sin requires a
            gradient, or a backend that cannot serve.
    """
    check(x, cos, sin)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.requires_grad:
            raise expected(name, "a tensor that requires no gradient", "one that does")
    chosen = serving(x, backend)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.rotary(x, cos, sin)
    out: Tensor = Rotary.apply(x, cos, sin, False, chosen)  # type: ignore[no-untyped-call]
    return out


def explain(x: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``x``, and why; UsageError for a named one that cannot."""
    return choice(x, backend)
