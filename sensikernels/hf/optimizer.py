"""Changes of an optimizer when parameters are replaced, frozen or given back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels.hf.moves import Entries, Move
from sensikernels.optim import SubsetAdamW

_STALE = "_sensikernels_replaced"


def staged(optimizer: Optimizer, moves: Sequence[Move]) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of every parameter that moves and has one, by the parameter it moves to.

    Changes nothing. Raises UsageError for state of a shape that cannot be cut.
    """
    inner = innermost(optimizer)
    made: dict[nn.Parameter, dict[str, Any]] = {}
    for move in moves:
        state = inner.state.get(move.old)
        if not state:
            continue
        if isinstance(inner, SubsetAdamW):
            made[move.new] = inner.moved_state(move.old, move.data, move.entries)
        else:
            made[move.new] = {key: _moved(inner, move, key, value) for key, value in state.items()}
    return made


def commit(
    optimizer: Optimizer,
    moves: Sequence[Move],
    states: Mapping[nn.Parameter, dict[str, Any]],
    *,
    frozen: Iterable[nn.Parameter] = (),
    thawed: Mapping[nn.Parameter, int] | None = None,
    order: Sequence[nn.Parameter] = (),
) -> Callable[[], None]:
    """Put ``moves`` and their staged ``states`` in force; returns the function that undoes it.

    ``frozen`` parameters leave the optimizer with their state, ``thawed`` ones join the group given
    for each unless they are there, before the first that comes later in ``order``: groups then do
    not tell in which order parameters were frozen and thawed, and a state dict fits a fresh run.
    """
    inner = innermost(optimizer)
    before = [list(group["params"]) for group in inner.param_groups]
    state_before = {p: inner.state[p] for p in _all(inner) if p in inner.state}
    places = {move.old: move.new for move in moves}
    gone = set(frozen)
    for group in inner.param_groups:
        kept = (places.get(p, p) for p in group["params"])
        group["params"][:] = [p for p in kept if p not in gone]
    held = set(_all(inner))
    for parameter, index in (thawed or {}).items():
        if parameter not in held:
            _insert(inner.param_groups[index]["params"], parameter, order)
    for old in (*places, *gone):
        inner.state.pop(old, None)
    inner.state.update(states)
    _forget(inner)

    def undo() -> None:
        for parameter in _all(inner):
            inner.state.pop(parameter, None)
        for group, params in zip(inner.param_groups, before, strict=True):
            group["params"][:] = params
        inner.state.update(state_before)
        _forget(inner)

    return undo


def _insert(group: list[Any], parameter: nn.Parameter, order: Sequence[nn.Parameter]) -> None:
    place = {id(p): i for i, p in enumerate(order)}
    mine = place.get(id(parameter), len(order))
    later = (i for i, p in enumerate(group) if place.get(id(p), -1) > mine)
    group.insert(next(later, len(group)), parameter)


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> int | None:
    """The index of the group that holds ``parameter``; None if none does."""
    groups = enumerate(innermost(optimizer).param_groups)
    return next((i for i, g in groups if any(p is parameter for p in g["params"])), None)


def home_of(optimizer: Optimizer, model: nn.Module, name: str) -> int:
    """The index of the group for a parameter that joins: the one that most of its kind are in."""
    groups = enumerate(innermost(optimizer).param_groups)
    index = {id(p): i for i, group in groups for p in group["params"]}
    kind = _kind(name)
    alike = [p for n, p in model.named_parameters() if _kind(n) == kind]
    votes = [index[id(p)] for p in alike if id(p) in index]
    return max(set(votes), key=votes.count) if votes else 0


def innermost(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, or the one given."""
    inner = getattr(optimizer, "optimizer", optimizer)
    known = isinstance(inner, Optimizer)
    require(known, "optimizer", "a torch.optim.Optimizer", type(inner).__name__)
    return inner


def mark_replaced(parameters: Iterable[Tensor], *, replaced: bool = True) -> None:
    """Have the first step of an optimizer that still holds one of ``parameters`` warn."""
    _watch()
    _seen.clear()
    for parameter in parameters:
        if replaced:
            setattr(parameter, _STALE, True)
        elif hasattr(parameter, _STALE):
            delattr(parameter, _STALE)


_seen: WeakSet[Optimizer] = WeakSet()
_watching: list[Any] = []


def _watch() -> None:
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: Optimizer, *_: Any) -> None:
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    stale = sum(hasattr(p, _STALE) for p in _all(optimizer))
    if stale:
        warnings.warn(
            f"{type(optimizer).__name__} holds {stale} parameters that are in the model no longer "
            "and will never move: pass it, as in sensikernels.apply(model, plan, optimizer=…), or "
            "make it after apply and restore",
            stacklevel=3,
        )


def _moved(optimizer: Optimizer, move: Move, key: str, value: Any) -> Any:
    """One entry of a parameter's state, cut as the parameter was. Raises UsageError."""
    if not _has_tensors(value):
        return value
    if isinstance(value, Tensor):
        if value.numel() == 1 and move.shape.numel() != 1:
            return value
        if value.shape == move.shape:
            return move.entries(value).contiguous()
        cut = _factor(move, key, value)
        if cut is not None:
            return cut(value)
    what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UsageError(
        f"optimizer: {move.name}: expected state of the parameter's shape {list(move.shape)} or "
        f"factored by rows and columns, got {key} {what} of {type(optimizer).__name__}"
    )


def _factor(move: Move, key: str, value: Tensor) -> Entries | None:
    """The cut of a factor of a matrix' second moments; None if ``value`` is no such factor."""
    if len(move.shape) != 2 or move.rows is None or move.columns is None:
        return None
    height, width = move.shape
    shape = tuple(value.shape)
    if shape == (height, 1) or (shape == (height,) and "row" in key):
        return _by_lines(move.rows, (height, 1))
    if shape == (1, width) or (shape == (width,) and "col" in key):
        return _by_lines(move.columns, (1, width))
    return None


def _by_lines(cut: Entries, shape: tuple[int, int]) -> Entries:
    def apply(value: Tensor) -> Tensor:
        lines = cut(value.reshape(shape))
        return lines.flatten() if value.ndim == 1 else lines

    return apply


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)


def _all(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _forget(optimizer: Optimizer) -> None:
    if isinstance(optimizer, SubsetAdamW):
        optimizer.params_changed()


def is_norm(name: str) -> bool:
    """Whether a parameter of that name belongs to a norm, which does not decay."""
    return "norm" in name.lower()


def _kind(name: str) -> str:
    """``norm.weight``, ``norm.bias``, ``weight`` or ``bias``; a parameter decays by its kind."""
    leaf = "weight" if name.endswith(".values") else name.rpartition(".")[2]
    return f"norm.{leaf}" if is_norm(name) else leaf
