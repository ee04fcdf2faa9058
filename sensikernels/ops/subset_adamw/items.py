"""What one parameter brings to a step, made of its state and its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sensikernels._checks import require
from sensikernels.ops.subset_adamw import state
from sensikernels.ops.subset_adamw.item import Item
from sensikernels.ops.subset_adamw.kept import KeptLayout

Sums = tuple[Tensor | None, Tensor | None]


def item_of(
    param: Tensor,
    own: dict[str, Any],
    group: dict[str, Any],
    place: int,
    layout: KeptLayout,
    sums: Mapping[Tensor, Sums],
) -> Item | None:
    """The item of ``param``, of the group at ``place``, its state started; None without a gradient.

    Raises ``UsageError`` for a sparse gradient that cannot be taken by rows.
    """
    grad = param.grad
    if grad is None:
        return None
    full = group["mode"] == "as_published"
    if "step" not in own:
        low = param.dtype in (torch.bfloat16, torch.float16)
        master = low and group["master_weights"] is not False
        state.start(param, own, layout, master=master, full=full)
    if grad.is_sparse:
        require(layout.kind == "all", "kept", "None under a sparse gradient", layout.kind)
        one = grad.sparse_dim() == 1
        require(one, "param.grad", "one sparse dimension", grad.sparse_dim())
        if "clock" not in own:
            state.start_clock(param, own)
    entries, grad = parts(grad)
    if entries is None and "clock" in own:
        # A dense gradient names every row.
        entries = torch.arange(param.shape[0], device=param.device)
    return Item(
        param=param if param.is_contiguous() else param.detach().contiguous(),
        home=None if param.is_contiguous() else param,
        grad=grad,
        exp_avg=own["exp_avg"],
        exp_avg_sq=own["exp_avg_sq"],
        master=own.get("master"),
        step=own["step"],
        layout=layout,
        group=place,
        masked=full and layout.kind != "all",
        cohort=own.get("cohort"),
        cohort_start=own.get("cohort_start"),
        entries=entries,
        clock=state.clock_of(own),
        sums=sums.get(param, (None, None)),
    )


def parts(grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """The rows of a gradient's values, as they came (None if it is dense), and the values."""
    return (grad._indices()[0], grad._values()) if grad.is_sparse else (None, grad)


def is_sparse(grad: Tensor | None) -> bool:
    """Whether a gradient names the rows that it has."""
    return grad is not None and grad.is_sparse
