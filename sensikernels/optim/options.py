"""Checks of a parameter group's options."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels.ops.subset_adamw.api import MODES


def check_options(group: dict[str, Any]) -> None:
    """Raise ``UsageError`` for an option that is wrong, or that SubsetAdamW does not have."""
    lr, betas = group["lr"], group["betas"]
    one = not isinstance(lr, Tensor) or lr.numel() == 1
    require(one, "lr", "a number or a tensor of one element", lr)
    if not isinstance(lr, Tensor):
        require(lr >= 0, "lr", "a number >= 0", lr)
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    inside = pair and all(0 <= beta < 1 for beta in betas)
    require(inside, "betas", "two numbers in [0, 1)", betas)
    for name in ("eps", "weight_decay"):
        number = group[name]
        ok = isinstance(number, (int, float)) and number >= 0
        require(ok, name, "a number >= 0", number)
    require_one_of(group["mode"], "mode", MODES)
    for name in ("amsgrad", "maximize"):
        require(not group.get(name), name, "False, SubsetAdamW does not do it", group.get(name))
    known = group["master_weights"] in ("auto", True, False)
    require(known, "master_weights", '"auto", True or False', group["master_weights"])
