"""``apply`` and ``restore``: a plan's layers and the features of the step, in and out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import UsageError
from sensikernels.hf import optimizer as following
from sensikernels.hf.aside import Exchange, check_linear, exchange, exchange_back, settle
from sensikernels.hf.features import check_features, has_features, restore_features, use_features
from sensikernels.hf.layers import encoder_layers, family_of
from sensikernels.hf.moves import Move
from sensikernels.hf.saving import stop_warning, warn_of_saving
from sensikernels.hf.targets import ATTENTION_LEFT, attention_left, attention_of, check_sizes
from sensikernels.masks.plans import Plan
from sensikernels.masks.structure import Coupling
from sensikernels.nn import SelectiveLinear

FORMS = ("compact", "masked")
_RECORD = "_sensikernels_swap"


@dataclass(frozen=True, kw_only=True, eq=False)
class Swap:
    """The record of one ``apply``, by module names; replaced linears are kept by their layers."""

    plan: Plan
    form: str
    replaced: tuple[str, ...]
    required_grad: Mapping[str, bool]
    attentions: Mapping[str, tuple[type, Mapping[str, Any]]] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    report: tuple[str, ...] = ()

    def record(self, model: nn.Module) -> None:
        """Have ``model`` carry this record, and warn where it is saved as if it were whole."""
        object.__setattr__(model, _RECORD, self)
        if self.plan.weight_masks:
            warn_of_saving(model)


def applied(model: nn.Module) -> Swap | None:
    """The model's swap record, or None where no plan is applied."""
    swap: Swap | None = getattr(model, _RECORD, None)
    return swap


def apply(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    features: Iterable[str] = (),
    form: str = "compact",
    optimizer: Optimizer | None = None,
) -> tuple[str, ...]:
    """Swap the planned linears and switch step features on, in place; one line per change.

    ``features``: names of ``hf.STEP_FEATURES``, any of them, with a plan or without. The fast dense
    step is ``apply(model, features=("dropout", "packed", "cls", "fused", "words"))``.
    ``form="compact"``: units go physically and compact shapes propagate between the linears of a
    coupling. ``form="masked"``: full shapes with the mask multiplied in, the definition.
    ``optimizer``: any of ``torch.optim``, or accelerate's wrapper of one. It then holds what
    trains, with the moments of what stays, so a running fine-tuning goes on; what is frozen leaves.
    An optimizer made before that is not passed warns at its first step.

    All or nothing: everything is checked before anything is changed; what fails later is undone.
    Hooks, modes, gradients and attributes of the replaced linears stay with their place.

    Raises:
        UsageError: a plan is already applied; a module is missing, not a plain ``nn.Linear`` or
            of another shape than planned; the plan is for another model; a coupling is left without
            a unit, or in a decoder; a feature is unknown, in use already, or not possible for this
            model; the optimizer has state of a shape that cannot be cut.
    """
    require_one_of(form, "form", FORMS)
    wanted = check_features(model, features)
    require(plan is not None or bool(wanted), "plan", "a plan, features or both", "neither")
    if plan is None:
        return use_features(model, wanted)
    require(applied(model) is None, "model", "no plan applied (restore first)", "one applied")
    changes = _planned(model, plan, form)
    moves = [move for change in changes for move in change.moves]
    states = {} if optimizer is None else following.staged(optimizer, moves)
    required = _requirements(model)
    with ExitStack() as undo:
        _exchange_all(model, changes, undo)
        attentions = _resize_attention(model, plan, undo) if form == "compact" else {}
        undo.callback(_require_grad, model, _requirements(model))
        _freeze(model, plan)
        report = use_features(model, wanted)  # after freezing: a prefix cache asks what is frozen
        if wanted:
            undo.callback(restore_features, model)
        follow: Any = (moves, states, required, {}, undo)
        groups = {} if optimizer is None else _follow(model, optimizer, *follow)
        undo.pop_all()
    following.mark_replaced(move.old for move in moves)
    swap = Swap(
        plan=plan,
        form=form,
        replaced=tuple(change.name for change in changes),
        required_grad=required,
        attentions=attentions,
        groups=groups,
        report=(*report, *(f"{change.name}: {change.new}" for change in changes)),
    )
    swap.record(model)
    return swap.report


def restore(model: nn.Module, *, optimizer: Optimizer | None = None) -> None:
    """Put the original modules back, with what training changed merged in, and switch features off.

    Entries that the plan dropped are as they were; without training in between the model is
    bit-equal to the one before ``apply``, and its Parameters are the same objects. ``optimizer``
    gets them back with the moments they have; entries that were dropped begin with none.

    Raises UsageError, before anything is changed, where there is nothing to undo or a layer is not
    the one that ``apply`` put there.
    """
    swap = applied(model)
    if swap is None and not has_features(model):
        raise UsageError("model: expected a plan or features applied, got none")
    if swap is not None:
        _restore_plan(model, swap, optimizer)
    if has_features(model):
        restore_features(model)


def _restore_plan(model: nn.Module, swap: Swap, optimizer: Optimizer | None) -> None:
    changes = [exchange_back(name, _submodule(model, name)) for name in swap.replaced]
    moves = [move for change in changes for move in change.moves]
    states = {} if optimizer is None else following.staged(optimizer, moves)
    required = _requirements(model)
    with ExitStack() as undo:
        _exchange_all(model, changes, undo)
        undo.callback(_require_grad, model, required)
        _require_grad(model, swap.required_grad)
        if optimizer is not None:
            _follow(model, optimizer, moves, states, required, swap.groups, undo)
        undo.pop_all()
    for name, (kind, had) in swap.attentions.items():
        _set_attention(model.get_submodule(name), kind, had, ATTENTION_LEFT)
    following.mark_replaced(move.old for move in moves)
    following.mark_replaced((move.new for move in moves), replaced=False)
    stop_warning(model)
    object.__delattr__(model, _RECORD)


def _planned(model: nn.Module, plan: Plan, form: str) -> list[Exchange]:
    """Check the whole plan against the model, then build every layer; the model is untouched."""
    both = sorted(plan.weight_masks.keys() & plan.update_masks.keys())
    require(not both, "plan", "one of weight_mask and update_mask", f"both for {both[:3]}")
    linears = {
        name: check_linear(model, name, mask.shape)
        for masks in (plan.weight_masks, plan.update_masks)
        for name, mask in masks.items()
    }
    plan.require_made_for(model)
    _refuse_shared(model, linears)
    known = {name for name, _ in model.named_parameters()}
    unknown = [name for name in plan.trainable or () if name not in known]
    require(not unknown, "plan trainable", "names of the model's parameters", unknown[:3])
    if plan.couplings:
        encoder_layers(model)
    for coupling in plan.couplings:
        kept = int(plan.kept_units(coupling).sum())
        require(kept > 0, f"plan: {coupling.name}", "at least one kept unit", kept)
        if form == "compact" and coupling.kind in ("qk", "vo"):
            check_sizes(model, plan, coupling)
    axes = (
        {m.module: m.axis for c in plan.couplings for m in c.members} if form == "compact" else {}
    )
    return [exchange(name, linear, plan, form, axes.get(name)) for name, linear in linears.items()]


def _refuse_shared(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Raise UsageError where a planned weight is used under another name as well."""
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    for name, linear in linears.items():
        for parameter in linear.parameters():
            where = homes[id(parameter)]
            require(len(where) == 1, f"module {name}", "Parameters of its own", f"shared: {where}")


def _exchange_all(model: nn.Module, changes: Sequence[Exchange], undo: ExitStack) -> None:
    for change in changes:
        undo.callback(_set_submodule, model, change.name, change.old)
        undo.callback(settle(change))
        _set_submodule(model, change.name, change.new)


def _follow(
    model: nn.Module,
    optimizer: Optimizer,
    moves: Sequence[Move],
    states: Mapping[nn.Parameter, dict[str, Any]],
    required: Mapping[str, bool],
    groups: Mapping[str, int],
    undo: ExitStack,
) -> dict[str, int]:
    """Have ``optimizer`` hold what trains now; the groups that frozen parameters were in."""
    renamed = {_twin(name): name for name in required}
    frozen: dict[nn.Parameter, str] = {}
    thawed: dict[nn.Parameter, int] = {}
    came = {move.new: move.old for move in moves}
    left: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        before = required.get(name, required.get(renamed.get(name, ""), parameter.requires_grad))
        if before and not parameter.requires_grad:
            frozen[parameter] = name
            home = following.group_of(optimizer, came.get(parameter, parameter))
            if home is not None:
                left[name] = home
        elif parameter.requires_grad and not before:
            thawed[parameter] = groups.get(name, following.home_of(optimizer, model, name))
    order = list(model.parameters())
    undo.callback(
        following.commit(optimizer, moves, states, frozen=frozen, thawed=thawed, order=order)
    )
    return left


def _twin(name: str) -> str:
    """The name that a selective layer has for a weight, and the other way round."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{ {'weight': 'values', 'values': 'weight'}.get(leaf, leaf) }"


def _freeze(model: nn.Module, plan: Plan) -> None:
    if plan.trainable is None:
        return
    trained = set(plan.trainable)
    selective = {n for n, m in model.named_modules() if isinstance(m, SelectiveLinear)}
    for name, parameter in model.named_parameters():
        stem, _, leaf = name.rpartition(".")
        named = f"{stem}.weight" if leaf == "values" and stem in selective else name
        parameter.requires_grad_(named in trained)


def _requirements(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def _require_grad(model: nn.Module, required: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required.get(name, parameter.requires_grad))


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        expected = "the layer that apply put there"
        raise UsageError(f"module {name}: expected {expected}, got none") from None


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _resize_attention(
    model: nn.Module, plan: Plan, undo: ExitStack
) -> dict[str, tuple[type, Mapping[str, Any]]]:
    """Give attention modules the counts, head sizes and heads that are left; what they had."""
    trimmed: dict[str, dict[str, Coupling]] = {}
    family = family_of(model) if plan.couplings else None
    for coupling in plan.couplings:
        if coupling.kind != "neurons" and family is not None:
            trimmed.setdefault(attention_of(coupling, family), {})[coupling.kind] = coupling
    before: dict[str, tuple[type, Mapping[str, Any]]] = {}
    for name, couplings in trimmed.items():
        assert family is not None
        attention = model.get_submodule(name)
        kept = {kind: plan.kept_units(coupling) for kind, coupling in couplings.items()}
        kind, now = attention_left(attention, family, kept, couplings)
        had = {key: vars(attention)[key] for key in now if key in vars(attention)}
        before[name] = type(attention), had
        undo.callback(_set_attention, attention, type(attention), had, now)
        _set_attention(attention, kind, now)
    return before


def _set_attention(
    attention: nn.Module, kind: type, attributes: Mapping[str, Any], gone: Iterable[str] = ()
) -> None:
    for key in gone:
        vars(attention).pop(key, None)
    attention.__class__ = kind
    vars(attention).update(attributes)
