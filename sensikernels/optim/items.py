"""Items of a step, each made of a parameter's state and gradient."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.subset_adamw.item import Item
from sensikernels.ops.subset_adamw.kept import KeptLayout
from sensikernels.optim import state

Sums = tuple[Tensor | None, Tensor | None]


class Ready:
    """A parameter's item of the last step, and whether it may serve again."""

    __slots__ = ("_held", "_own", "item", "param")

    def __init__(self, param: Tensor, own: dict[str, Any], item: Item | None) -> None:
        self.param, self.item = param, item
        self._own, self._held = own, tuple(own.values())

    def again(self, param: Tensor, own: dict[str, Any] | None) -> bool:
        """Take ``param``'s new gradient, if neither it nor its state was replaced; else False."""
        item, grad = self.item, param.grad
        if param is not self.param or own is not self._own or len(own) != len(self._held):
            return False
        if item is None or grad is None:
            return item is None and grad is None
        if not all(map(is_, own.values(), self._held)):
            return False
        if item.home is None:
            if not param.is_contiguous():
                return False
        elif item.param.dtype != param.dtype:
            return False
        if item.layout.shape != param.shape:
            return False
        if grad.is_sparse != (item.clock is not None) or grad.dtype != item.grad.dtype:
            return False
        item.entries, item.grad = parts(grad)
        return True


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
    shape = tuple(param.shape) if full else layout.state_shape
    for name in state.PER_ENTRY:
        if name in own:
            got = tuple(own[name].shape)
            require(got == shape, f"state: {name}", list(shape), list(got))
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
