"""The functional subset AdamW step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import expected, require, require_one_of
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.subset_adamw import ops as _registered  # noqa: F401
from sensikernels.ops.subset_adamw.checks import check_lists
from sensikernels.ops.subset_adamw.engine import choice
from sensikernels.ops.subset_adamw.kept import KINDS, make_layout

MODES = ("as_published", "hard_freeze")


def subset_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    kept: Sequence[tuple[Any, ...] | None] | None = None,
    masters: Sequence[Tensor] | None = None,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    mode: str = "hard_freeze",
    backend: str = "auto",
) -> Tensor:
    """One AdamW step on the kept entries of each parameter, in place, in one launch.

    ``kept[i]`` is as in :meth:`SubsetAdamW.set_kept`. ``exp_avgs[i]``, ``exp_avg_sqs[i]`` and
    ``masters[i]`` (float32; an empty tensor or no list for none) are contiguous and hold kept
    entries only: rows [kept, ...], columns [rows, kept], blocks [kept, h, w], elements [kept];
    in mode ``as_published`` they have the parameter's shape. ``steps[i]``: float32 [].
    Gradients are divided by ``grad_scale``; a nonzero ``found_inf`` leaves everything as it is.
    A gradient's NaN reaches its own entry; with ``max_grad_norm`` it reaches every entry, and an
    infinity makes its own entry NaN and every other gradient zero, as ``clip_grad_norm_`` does.

    Returns the norm of the kept gradients before clipping, float32 []; 0 without
    ``max_grad_norm``. Raises ``UsageError`` before anything is changed.
    """
    require_one_of(mode, "mode", MODES)
    kept = [None] * len(params) if kept is None else kept
    lists = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "kept": kept}
    check_lists(params, {"grads": grads, **lists, "masters": masters or params})
    device = params[0].device
    # The operator checks the rest, whoever calls it.
    layouts = [make_layout(p.shape, how, p) for p, how in zip(params, kept, strict=True)]
    empty = torch.empty(0, dtype=torch.int32, device=device)
    norm: Tensor = torch.ops.sensikernels.subset_adamw(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(masters or []),
        list(steps),
        [empty if layout.index is None else layout.index for layout in layouts],
        [KINDS.index(layout.kind) for layout in layouts],
        [size for layout in layouts for size in layout.block_shape],
        _hyper(lr, [*betas, eps, weight_decay], device),
        max_grad_norm=max_grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        masked=mode == "as_published",
        backend=backend,
    )
    return norm


def _hyper(lr: float | Tensor, rates: Sequence[float], device: torch.device) -> Tensor:
    """float64 [1, 5], checked."""
    numbers = [0.0 if isinstance(lr, Tensor) else lr, *rates]
    names = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay")
    for name, value in zip(names, numbers, strict=True):
        below = 1.0 if name[0] == "b" else math.inf
        if not 0.0 <= value < below:
            raise expected(name, f"a number in [0, {below})", value)
    hyper = torch.tensor([numbers], dtype=torch.float64, device=device)
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, "lr", "one number", list(lr.shape))
        hyper[0, 0] = lr.squeeze()
    return hyper


def explain(params: Sequence[Tensor], *, backend: str = "auto") -> Choice:
    """The backend that :func:`subset_adamw` runs for ``params``, and why."""
    return choice(backend, params[0].device, {param.dtype for param in params})
