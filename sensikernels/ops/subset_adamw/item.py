"""The input of one step, which every implementation reads: an item per parameter, and scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sensikernels.ops.subset_adamw.kept import KeptLayout


class Scaling(NamedTuple):
    """Factors of all gradients of a step, and whether the step is left out.

    Gradients are divided by ``grad_scale``, one floating number on their device, then scaled so
    that their joint norm is at most ``max_grad_norm``. With a nonzero ``found_inf`` nothing
    changes.
    """

    max_grad_norm: float | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class Clock:
    """Bookkeeping of a table whose rows are updated only when a gradient names them.

    ``now``: float64 [5], the sum over the table's steps of log(1 - lr * weight_decay), log(beta1),
    log(beta2) and lr, and the last lr. ``rows``: float64 [rows, 5], the value of ``now`` that each
    row is up to date with.
    """

    now: Tensor
    rows: Tensor


@dataclass(kw_only=True, eq=False)
class Item:
    """One parameter of a step. State tensors have ``layout.state_shape`` and are contiguous.

    ``param``, ``grad``: the layout's shape; ``grad`` is [entries, ...] where ``entries`` is given.
    ``exp_avg``, ``exp_avg_sq``, ``master``: float32 (float64 for a float64 parameter).
    ``home``: the strided parameter that ``param`` is a contiguous copy of, or None.
    ``step``: float32 []. ``group``: row of the ``hyper`` table.
    ``cohort``: uint8, per kept entry the index into ``cohort_start``, float32 [cohorts]: the step
    after which the entry joined; None if all joined at 0.
    ``masked``: frozen entries are updated too, from a zero gradient; state covers all entries.
    ``entries``: int64 [entries], the row each entry of ``grad`` is added to, in any order, a row as
    often as it likes; needs ``clock``. None: ``grad`` is dense.
    ``sums``: float32 [rows] each, += Σ|w·g| and += Σg² over the kept entries of a row.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    step: Tensor
    layout: KeptLayout
    group: int = 0
    masked: bool = False
    cohort: Tensor | None = None
    cohort_start: Tensor | None = None
    entries: Tensor | None = None
    clock: Clock | None = None
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    home: Tensor | None = None
