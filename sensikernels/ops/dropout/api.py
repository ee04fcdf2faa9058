"""``dropout``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import expected, require_one_of
from sensikernels.ops.common.checks import check_tensor
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.drops import new_seed, threshold_of
from sensikernels.ops.common.rowwise import choice, serving
from sensikernels.ops.dropout.autograd import Dropout


def dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 - p).

    The keep probability is rounded to a multiple of 2⁻¹⁶ and the scale is that multiple's own
    inverse, so the mean is exact. Dropped elements are 0 even where ``x`` is not finite. The mask
    depends on ``seed`` and the element's position alone: not on dtype, device, threads or backend.

    Args:
        x: any shape, a floating dtype.
        p: probability in [0, 1].
        training: False returns ``x`` itself.
        seed: int64 ``[]`` on x's device; drawn from torch's generator of that device if absent.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        UsageError: p outside [0, 1], an integer ``x``, a seed of another kind, a backend that
            cannot serve.
    """
    threshold = threshold_of(p, "p")
    if not x.is_floating_point():
        raise expected("x", "a floating dtype", x.dtype)
    if seed is not None:
        check_tensor(seed, "seed", (), torch.int64, x.device)
    if backend not in environment.BACKENDS:
        require_one_of(backend, "backend", environment.BACKENDS)
    if not training or p == 0.0:
        return x
    if seed is None:
        seed = new_seed(x.device)
    chosen = serving(x, backend)
    out: Tensor = Dropout.apply(x, seed, threshold, chosen)  # type: ignore[no-untyped-call]
    return out


def explain(x: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``x``, and why; UsageError for a named one that cannot."""
    return choice(x, backend)
