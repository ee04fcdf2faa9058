"""The linear that a plan replaced, kept by the layer that took its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels.hf.module_state import added, carry
from sensikernels.hf.moves import Move, cut_bias, cut_weight, grow_bias, grow_weight
from sensikernels.layouts import full_weight
from sensikernels.masks.plans import Plan
from sensikernels.nn import MaskedLinear, SelectiveLinear

Swapped: TypeAlias = MaskedLinear | SelectiveLinear
_ASIDE = "_sensikernels_aside"


@dataclass(frozen=True, kw_only=True, eq=False)
class Aside:
    """The linear itself, without its data, and the entries that its replacement does not hold.

    ``dropped`` and ``dropped_bias`` are the entries that the mask drops, on the host. They are no
    buffers: nothing sends, casts or saves them, and every copy of the layer has its own.
    """

    linear: nn.Linear
    own: frozenset[str]
    dropped: Tensor | None = None
    dropped_bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """One module takes another's place in a model: ``old`` goes, ``new`` comes."""

    name: str
    old: nn.Module
    new: nn.Module
    moves: tuple[Move, ...]


def check_linear(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Linear:
    """The linear of that name. Raises UsageError unless it can be replaced and given back."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UsageError(
            f"plan: expected a model with a module {name}, got {type(model).__name__} without it"
        ) from None
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise UsageError(f"module {name}: expected an nn.Linear, got a {kind}")
    got = tuple(module._parameters)
    rest = [*module._buffers, *module._modules]
    if set(got) != {"weight", "bias"} or rest:
        raise UsageError(
            f"module {name}: expected parameters weight and bias, got {[*got, *rest]} (remove "
            "pruning or parametrization first)"
        )
    size = tuple(module.weight.shape)
    require(size == shape, f"plan: {name}", f"a weight {list(shape)}", list(size))
    require(
        module.weight.is_floating_point(),
        f"module {name}",
        "a floating-point weight",
        module.weight.dtype,
    )
    taken = _TAKEN & {*added(module)}
    if "forward" in vars(module) or taken:
        raise UsageError(
            f"module {name}: expected its own forward and no attributes of a masked layer, got "
            f"{sorted(taken) or 'another forward on the instance'}"
        )
    for leaf, parameter in module.named_parameters():
        watched = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        require(not watched, f"{name}.{leaf}", "no hooks on the parameter", "hooks")
    return module


def exchange(name: str, linear: nn.Linear, plan: Plan, form: str, axis: int | None) -> Exchange:
    """Build the layer that takes ``linear``'s place; ``linear`` is not touched.

    ``axis``: the axis along which a coupling makes the layer compact, if one does.
    """
    weight: Any = linear.weight
    if name in plan.update_masks:
        new: Swapped = SelectiveLinear.from_linear(linear, plan.update_masks[name])
        values: Any = new.values
    else:
        new = MaskedLinear.from_linear(
            linear,
            plan.weight_masks[name],
            compact_input=axis == 1,
            compact_output=axis == 0,
            backend="reference" if form == "masked" else "auto",
        )
        values = new.weight
    moves = []
    if values is not linear.weight:
        values.requires_grad_(linear.weight.requires_grad)
        moves.append(cut_weight(f"{name}.weight", weight, values, new.layout))
    if new.bias is not None and new.bias is not linear.bias:
        moves.append(cut_bias(f"{name}.bias", linear.bias, new.bias, bias_rows(new)))
    aside = Aside(linear=linear, own=frozenset(vars(new)) | {_ASIDE})
    if isinstance(new, MaskedLinear):
        kept = _kept(new)
        aside = replace(aside, dropped=linear.weight.detach()[~kept].cpu())
        if new.bias is not linear.bias:
            gone = ~kept.any(1)
            aside = replace(aside, dropped_bias=linear.bias.detach()[gone].cpu())
    carry(linear, new, added(linear))
    setattr(new, _ASIDE, aside)
    return Exchange(name=name, old=linear, new=new, moves=tuple(moves))


@torch.no_grad()
def exchange_back(name: str, module: nn.Module) -> Exchange:
    """Build the full-size Parameters that a replaced linear gets back; nothing is touched.

    Dropped entries are as they were, all others as they are now. Raises UsageError where there
    is no such layer.
    """
    aside = vars(module).get(_ASIDE)
    if not isinstance(module, (MaskedLinear, SelectiveLinear)) or not isinstance(aside, Aside):
        raise UsageError(
            f"module {name}: expected the layer that apply put there, got {type(module).__name__}"
        )
    linear: Any = aside.linear
    moves = []
    if isinstance(module, SelectiveLinear):
        module.refresh()
        values, weight = module.values, module.weight
    else:
        values = module.weight
        weight = full_weight(values, module.layout, compact=False)
        assert aside.dropped is not None
        weight = weight.masked_scatter(~_kept(module), aside.dropped.to(weight))
    if values is not linear.weight:
        home = _home(linear.weight, weight)
        moves.append(grow_weight(f"{name}.weight", values, home, weight, module.layout))
    if module.bias is not None and module.bias is not linear.bias:
        home, whole = _home(linear.bias, module.bias), _whole_bias(module, aside)
        moves.append(grow_bias(f"{name}.bias", module.bias, home, whole, bias_rows(module)))
    return Exchange(name=name, old=module, new=linear, moves=tuple(moves))


def settle(change: Exchange) -> Callable[[], None]:
    """Give the Parameters of ``change.new`` their data; returns the function that undoes it.

    Where a layer goes in, the whole Parameters are emptied but stay the same objects, so that they
    are the same again after ``restore``.
    """
    moves = change.moves
    before = [(p, p.data, p.grad) for move in moves for p in (move.old, move.new)]
    grads = [_moved_grad(move) for move in moves]
    for move, grad in zip(moves, grads, strict=True):
        vars(move.new).update(vars(move.old))
        move.new.requires_grad_(move.old.requires_grad)
        if isinstance(change.new, nn.Linear):
            move.new.data = move.data
            change.new._parameters[move.name.rpartition(".")[2]] = move.new
        else:
            move.old.grad = None
            move.old.data = move.old.data.new_empty(0)
        move.new.grad = grad
    if isinstance(change.new, nn.Linear):
        _give_back(change.old, change.new)

    def undo() -> None:
        for parameter, data, grad in before:
            parameter.data, parameter.grad = data, grad

    return undo


def bias_rows(module: Swapped) -> Tensor | None:
    """The rows that a layer's bias has; None if all."""
    return module.layout.rows if module.layout.compact_output else None


def user_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that users put on a layer that ``exchange`` made."""
    aside: Aside = vars(module)[_ASIDE]
    return {name: value for name, value in vars(module).items() if name not in aside.own}


def _give_back(module: nn.Module, linear: nn.Linear) -> None:
    """Give ``linear`` the hooks, the mode and the attributes that ``module`` has now."""
    now = user_attributes(module)
    for name in set(added(linear)) - set(now):
        delattr(linear, name)
    carry(module, linear, now)


def _kept(module: Swapped) -> Tensor:
    return module.mask.dense().to(next(module.parameters()).device)


def _whole_bias(module: Swapped, aside: Aside) -> Tensor:
    assert module.bias is not None
    bias = module.bias.detach()
    if aside.dropped_bias is None:
        return bias
    rows = _kept(module).any(1)
    full = bias.new_zeros(len(rows)).masked_scatter(rows, bias)
    return full.masked_scatter(~rows, aside.dropped_bias.to(full))


def _home(held: nn.Parameter, data: Tensor) -> nn.Parameter:
    """The Parameter the linear had, or a new one if the data is on a device of another type now."""
    same = held.device.type == data.device.type
    return held if same else nn.Parameter(data, requires_grad=held.requires_grad)


def _moved_grad(move: Move) -> Tensor | None:
    grad = move.old.grad
    return None if grad is None else move.entries(grad).contiguous()


_TAKEN = frozenset(
    {"mask", "layout", "activation", "backend", "values", "_compact", "_seen", _ASIDE}
)
