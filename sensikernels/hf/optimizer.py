"""Carry an optimizer's moments along when parameters shrink."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels.layouts import PackedLayout
from sensikernels.nn import MaskedLinear
from sensikernels.ops.subset_adamw import SubsetAdamW


@torch.no_grad()
def slice_optimizer(optimizer: Optimizer, old: nn.Linear, new: MaskedLinear) -> None:
    """Replace ``old``'s parameters by ``new``'s in every group and slice their moments alike.

    A state tensor of the parameter's own shape is cut with the indices that cut the weight;
    anything else (a step count) is kept. Works on any ``torch.optim.Optimizer``.
    """
    layout = new.layout
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layer: expected a packed layout, got {type(layout).__name__}")
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    replace: Any = _replace_in_subset if isinstance(inner, SubsetAdamW) else _replace
    cuts = [(index, dim) for dim, index in enumerate((layout.rows, layout.columns))]
    present = [(index, dim) for index, dim in cuts if index is not None]
    if new.weight is not old.weight:
        replace(inner, old.weight, new.weight, present)
    if new.bias is not None and new.bias is not old.bias:
        replace(inner, old.bias, new.bias, [(i, d) for i, d in present if d == 0])


def _replace(
    optimizer: Any, old: nn.Parameter, new: nn.Parameter, cuts: list[tuple[Tensor, int]]
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state: dict[str, Any] | None = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: _cut(value, cuts) if _is_like(value, old) else value
            for key, value in state.items()
        }


def _replace_in_subset(
    optimizer: Any, old: nn.Parameter, new: nn.Parameter, cuts: list[tuple[Tensor, int]]
) -> None:
    optimizer.slice_state(old, new, [index for index, _ in cuts], [dim for _, dim in cuts])


def _is_like(value: Any, parameter: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape and value.ndim > 0


def _cut(value: Tensor, cuts: list[tuple[Tensor, int]]) -> Tensor:
    for index, dim in cuts:
        value = value.index_select(dim, index.to(value.device))
    return value.contiguous()
