"""``dropout_add_norm``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import require_one_of
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.drops import Drop, drop_of
from sensikernels.ops.common.norms import check_eps
from sensikernels.ops.common.rowwise import choice, serving
from sensikernels.ops.dropout_add_norm import reference
from sensikernels.ops.dropout_add_norm.autograd import DropoutAddNorm
from sensikernels.ops.dropout_add_norm.checks import check

RECOVER = ("auto", "output", "sum")


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    recover: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """``LayerNorm(residual + dropout(x)) · weight + bias``: the post-norm of BERT in one pass.

    The mask is that of ``ops.dropout`` (counter based, keep probability rounded to 2⁻¹⁶) and is
    drawn again in backward. Sums and statistics are float32. Saved: mean and 1 / standard
    deviation of each row, the seed, and what ``recover`` names. The gradients of weight and bias
    are summed in an order that does not depend on the number of threads.

    Args:
        x, residual: ``[..., hidden]`` of one floating dtype, which autocast does not change.
        weight, bias: ``[hidden]``, any floating dtype.
        dropout: probability in [0, 1] of dropping an element of ``x``; 0 outside training.
        eps: added to the variance.
        seed: int64 ``[]`` on x's device; drawn from torch's generator of that device if absent.
        recover: what backward takes the normalised row from. "sum": a tensor of its own, in x's
            dtype. "output": the result, which a linear that follows saves anyway; no weight may be
            near 0 or small beside its bias. "auto": the output if no ``|bias| > 2 |weight|``, on a
            CPU and not traced, else the sum. The reference saves what autograd saves.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        As ``x``; once differentiable (the reference to any order).

    Raises:
        UsageError: shapes, dtypes, devices or numbers do not fit, or a backend that cannot serve.
    """
    check(x, residual, weight, bias)
    check_eps(eps)
    drop = drop_of(dropout, seed, x.device)
    if recover not in RECOVER:
        require_one_of(recover, "recover", RECOVER)
    chosen = serving(x, backend)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.dropout_add_norm(x, residual, weight, bias, Drop(*drop), eps)
    arguments = (x, residual, weight, bias, *drop, eps, recover, chosen)
    out: Tensor = DropoutAddNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def explain(x: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``x``, and why; UsageError for a named one that cannot."""
    return choice(x, backend)
