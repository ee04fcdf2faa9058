"""Per-parameter optimizer state, and how it follows a change of kept entries or shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sensikernels._bits import pack_bits
from sensikernels._checks import require
from sensikernels.ops.subset_adamw import reference
from sensikernels.ops.subset_adamw.item import Clock
from sensikernels.ops.subset_adamw.kept import KeptLayout, make_layout, matrix_shape

PER_ENTRY = ("exp_avg", "exp_avg_sq", "master", "cohort")
_COHORTS = 256


def compute_dtype(param: Tensor) -> torch.dtype:
    """dtype of moments and master weights."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def layout_of(param: Tensor, state: dict[str, Any]) -> KeptLayout:
    """The layout ``state["kept"]`` describes; all entries if it is absent."""
    saved = state.get("kept")
    if saved is None:
        return make_layout(param.shape, None, param)
    return KeptLayout.from_state(param.shape, saved)


def clock_of(state: dict[str, Any]) -> Clock | None:
    """The decay bookkeeping of a table updated by rows; None for any other parameter."""
    return Clock(now=state["clock"], rows=state["row_clock"]) if "clock" in state else None


def start(
    param: Tensor, state: dict[str, Any], layout: KeptLayout, *, master: bool, full: bool
) -> None:
    """Fill ``state`` before a parameter's first step; ``full`` covers frozen entries too."""
    shape = tuple(param.shape) if full else layout.state_shape
    dtype, device = compute_dtype(param), param.device
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state["exp_avg"] = torch.zeros(shape, dtype=dtype, device=device)
    state["exp_avg_sq"] = torch.zeros(shape, dtype=dtype, device=device)
    if master:
        weight = param.detach().contiguous()
        state["master"] = torch.zeros(shape, dtype=dtype, device=device)
        (state["master"] if full else layout.live(state["master"])).copy_(
            weight if full else layout.gather(weight)
        )
    if layout.kind != "all" and not full:
        _start_cohorts(state)


def _start_cohorts(state: dict[str, Any]) -> None:
    """Who joined when: all at the first step, so far. Here before it is needed, so that a captured
    step reads it from the beginning."""
    state["cohort"] = torch.zeros_like(state["exp_avg"], dtype=torch.uint8)
    state["cohort_start"] = state["step"].new_zeros(_COHORTS)


def start_clock(param: Tensor, state: dict[str, Any]) -> None:
    """Begin row-wise bookkeeping; every row is up to date now."""
    state["clock"] = torch.zeros(5, dtype=torch.float64, device=param.device)
    state["row_clock"] = param.new_zeros((param.shape[0], 5), dtype=torch.float64)


def catch_up(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Bring the rows of a table up to date; nothing for any other parameter."""
    clock = clock_of(state)
    if clock is not None:
        numbers = [0.0, *group["betas"], group["eps"], group["weight_decay"]]
        reference.catch_up(
            param, state["exp_avg"], state["exp_avg_sq"], state.get("master"), clock,
            clock.now.new_tensor(numbers), state["step"],
        )  # fmt: skip


def change_kept(param: Tensor, state: dict[str, Any], old: KeptLayout, new: KeptLayout) -> None:
    """Carry compact state from ``old`` to ``new``: what stays is unchanged, what joins starts.

    State of the same shape is written in place. Moments of joining entries are zero and their bias
    correction counts from now; their master weight is the parameter's value.
    """
    weight = param.detach().contiguous()
    joined = new.gather(~old.flags().to(param.device))
    late = bool(joined.any()) and float(state["step"]) > 0
    if "cohort" not in state and (late or new.kind != "all"):
        _start_cohorts(state)
    for name in PER_ENTRY:
        if name not in state:
            continue
        held: Tensor = state[name]
        full = weight.to(held.dtype) if name == "master" else None
        full = weight.new_zeros(weight.shape, dtype=held.dtype) if full is None else full
        full = full.clone() if full is weight else full
        old.scatter_(full, old.live(held))
        if held.shape != new.state_shape:
            held = state[name] = held.new_empty(new.state_shape)
        held.zero_()
        new.live(held).copy_(new.gather(full))
    if late:
        _start_cohort(state, new.live(state["cohort"]), joined)


def _start_cohort(state: dict[str, Any], cohort: Tensor, joined: Tensor) -> None:
    """Entries that joined become the cohort after the highest in use."""
    starts = state["cohort_start"]
    used = int(cohort.max()) + 1
    if used == starts.numel():
        # The two oldest differ least in bias correction: they become one.
        cohort.copy_((cohort.int() - 1).clamp(min=0))
        starts[:-1] = starts[1:].clone()
        used -= 1
    cohort.masked_fill_(joined, used)
    starts[used].copy_(state["step"])


def select(full: Tensor, index: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """``full`` with ``index[i]`` taken along ``dims[i]``, contiguous."""
    for along, positions in zip(dims, index, strict=True):
        full = full.index_select(along, positions.to(full.device))
    return full.contiguous()


def slice_layout(
    layout: KeptLayout, shape: torch.Size, index: Sequence[Tensor], dims: Sequence[int]
) -> KeptLayout:
    """The kept entries that remain after slicing, as rows or columns if they were, else by bit."""
    if layout.kind == "all" or layout.index is None:
        return make_layout(shape, None, None)
    flags = select(layout.flags(), index, dims)
    require(flags.shape == shape, "new_param", f"shape {list(flags.shape)}", list(shape))
    if layout.kind in ("rows", "columns"):
        along = 0 if layout.kind == "rows" else 1
        lines = torch.zeros(matrix_shape(layout.shape)[along], dtype=torch.bool)
        lines[layout.index[: layout.units].long().cpu()] = True
        taken = [i for i, dim in zip(index, dims, strict=True) if dim == along]
        lines = lines[taken[0].long().cpu()] if taken and len(shape) <= 2 else lines
        if len(lines) == matrix_shape(shape)[along]:
            kept = (layout.kind, lines.nonzero().flatten().int())
            return make_layout(shape, kept, layout.index)
    return make_layout(shape, ("elements", pack_bits(flags.flatten())), layout.index)


def slice_state(
    state: dict[str, Any],
    old: KeptLayout,
    new: KeptLayout,
    index: Sequence[Tensor],
    dims: Sequence[int],
    *,
    full: bool,
) -> dict[str, Any]:
    """``state`` of a sliced parameter; ``full``: its tensors cover frozen entries too."""
    sliced = dict(state)
    for name in PER_ENTRY:
        if name not in state:
            continue
        if full or old.kind == "all":
            sliced[name] = select(state[name], index, dims)
            continue
        wide = torch.zeros(old.shape, dtype=state[name].dtype, device=state[name].device)
        old.scatter_(wide, old.live(state[name]))
        sliced[name] = new.gather(select(wide, index, dims))
    if "row_clock" in state and 0 in dims:
        rows = index[list(dims).index(0)]
        sliced["row_clock"] = select(state["row_clock"], [rows], [0])
    if old.kind != "all":
        sliced["kept"] = new.to_state()
    return sliced
