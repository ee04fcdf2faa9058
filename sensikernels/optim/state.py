"""Per-parameter optimizer state, and how it follows a change of kept entries or shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.bits import pack_bits
from sensikernels._core.checks import require
from sensikernels.ops.subset_adamw import reference
from sensikernels.ops.subset_adamw.item import Clock
from sensikernels.ops.subset_adamw.kept import KeptLayout, make_layout, matrix_shape
from sensikernels.optim.line import Line

PER_ENTRY = ("exp_avg", "exp_avg_sq", "master", "cohort")
_COHORTS = 256
_NEARLY_ZERO = 1e-300
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_KNOWN = {*_MOMENTS, *PER_ENTRY, "cohort_start", "kept", "clock", "row_clock"}


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
    """Note when each entry joined: all at the first step, so far. It is there before it is needed,
    so that a captured step reads it from the beginning."""
    state["cohort"] = torch.zeros_like(state["exp_avg"], dtype=torch.uint8)
    state["cohort_start"] = state["step"].new_zeros(_COHORTS)


def start_clock(param: Tensor, state: dict[str, Any]) -> None:
    """Begin row-wise bookkeeping; every row is up to date now."""
    state["clock"] = torch.zeros(5, dtype=torch.float64, device=param.device)
    state["row_clock"] = param.new_zeros((param.shape[0], 5), dtype=torch.float64)


def catch_up(param: Tensor, state: dict[str, Any], line: Line) -> None:
    """Bring the rows of a table up to date; nothing for any other parameter."""
    clock = clock_of(state)
    if clock is not None:
        numbers = [0.0, line.beta1, line.beta2, line.eps, line.weight_decay]
        reference.catch_up(
            param,
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("master"),
            clock,
            clock.now.new_tensor(numbers),
            state["step"],
            terms=line.steps,
        )


def restart(state: dict[str, Any], rate: float) -> None:
    """Have the rows of a table, all up to date, wait from here along a line that begins at rate."""
    state["row_clock"][:, 4] = rate


def lean(state: dict[str, Any], slope: float) -> None:
    """Rows of a table that waited through the first step of a line learn of its slope.

    Their clock counts a line from the step before the first that they miss.
    """
    rows, now = state["row_clock"], state["clock"]
    before = rows[:, 4] - slope
    before = torch.where(before == 0, _NEARLY_ZERO, before)  # 0 would be: not known
    rows[:, 4] = torch.where(rows[:, 3] < now[3], before, rows[:, 4])


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


def moved(
    state: dict[str, Any],
    old: KeptLayout,
    new_param: Tensor,
    entries: Callable[[Tensor], Tensor],
    *,
    full: bool,
) -> dict[str, Any]:
    """``state`` of the parameter that ``entries`` makes; ``full``: it covers frozen entries too."""
    made = dict(state)
    kept = _described(entries(old.flags()), entries(torch.ones(old.shape, dtype=torch.bool)))
    new = make_layout(new_param.shape, kept, new_param)
    made.pop("kept", None)
    if new.kind != "all":
        made["kept"] = new.to_state()
    for name in PER_ENTRY:
        if name not in state:
            continue
        wide = state[name]
        if not full and old.kind != "all":
            wide = torch.zeros(old.shape, dtype=wide.dtype, device=wide.device)
            old.scatter_(wide, old.live(state[name]))
        cut = entries(wide).contiguous()
        if name == "master":
            there = entries(torch.ones_like(wide, dtype=torch.bool))
            cut = torch.where(there, cut, new_param.detach().to(cut.dtype))
        made[name] = cut if full else new.gather(cut)
    return made


def _described(flags: Tensor, known: Tensor) -> tuple[Any, ...] | None:
    """Kept entries as ``make_layout`` takes them: all, rows, columns or bits.

    What is not ``known`` of the old parameter is new, and kept.
    """
    flags = flags | ~known.to(flags.device)
    if bool(flags.all()):
        return None
    matrix = flags.reshape(matrix_shape(flags.shape))
    rows, columns = matrix.any(1), matrix.any(0)
    if torch.equal(matrix, rows[:, None].expand_as(matrix)):
        return "rows", rows.nonzero().flatten().int()
    if flags.ndim > 1 and torch.equal(matrix, columns.expand_as(matrix)):
        return "columns", columns.nonzero().flatten().int()
    return "elements", pack_bits(flags.flatten())


def loaded(param: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state from what a checkpoint holds, ours or that of torch's Adam.

    Raises ``UsageError`` for state of another kind or another shape.
    """
    what = "the state of SubsetAdamW, AdamW or Adam"
    require(
        set(saved) <= _KNOWN and not saved or _MOMENTS <= set(saved) <= _KNOWN,
        "state_dict",
        what,
        sorted(map(str, saved)),
    )
    own: dict[str, Any] = _copied(saved, param.device)
    if not own:
        return own
    full = group["mode"] == "as_published"
    layout = make_layout(param.shape, None, param)
    if "kept" in own:
        layout = KeptLayout.checked(param.shape, own["kept"])
        own["kept"] = layout.to_state()
    shape = tuple(param.shape) if full else layout.state_shape
    for name in PER_ENTRY:
        if name in own:
            got = tuple(own[name].shape)
            require(got == shape, f"state_dict: {name}", list(shape), list(got))
    _require_bookkeeping(param, own)
    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=param.device).reshape(())
    for name in ("exp_avg", "exp_avg_sq"):
        own[name] = own[name].to(compute_dtype(param)).contiguous()
    low = param.dtype in (torch.bfloat16, torch.float16)
    if low and group["master_weights"] is not False and "master" not in own:
        own["master"] = param.detach().to(compute_dtype(param)).contiguous()
    if layout.kind != "all" and not full and "cohort" not in own:
        _start_cohorts(own)
    return own


def _require_bookkeeping(param: Tensor, own: dict[str, Any]) -> None:
    """Kernels read these by row and cohort without looking: sizes and dtypes must be ours."""
    expected = {
        "clock": ((5,), torch.float64),
        "row_clock": ((*param.shape[:1], 5), torch.float64),
        "cohort_start": ((_COHORTS,), torch.float32),
    }
    for name, (shape, dtype) in expected.items():
        if name in own:
            got = (tuple(own[name].shape), own[name].dtype)
            require(got == (shape, dtype), f"state_dict: {name}", (shape, dtype), got)
    for one, other in (("clock", "row_clock"), ("cohort", "cohort_start")):
        require((one in own) == (other in own), "state_dict", f"{one} and {other}", sorted(own))
    if "cohort" in own:
        require(
            own["cohort"].dtype == torch.uint8, "state_dict: cohort", "uint8", own["cohort"].dtype
        )


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {name: _copied(item, device) for name, item in value.items()}
    return value
