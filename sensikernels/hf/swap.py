"""Put a plan's layers and the parts of the step into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels._checks import require, require_one_of
from sensikernels.errors import UsageError
from sensikernels.hf.optimizer import slice_optimizer
from sensikernels.hf.packed import adjoin_projections
from sensikernels.hf.parts import check_parts, has_parts, restore_parts, use_parts
from sensikernels.hf.targets import PARTS
from sensikernels.masks.plans import Plan
from sensikernels.masks.structure import Coupling
from sensikernels.nn import MaskedLinear, SelectiveLinear

FORMS = ("packed", "masked")
_RECORD = "_sensikernels_swap"


@dataclass(frozen=True, kw_only=True, eq=False)
class Swap:
    """What ``apply`` did to a model; ``restore`` undoes it."""

    plan: Plan
    form: str
    originals: Mapping[str, nn.Module]
    required_grad: Mapping[str, bool]
    report: tuple[str, ...]


def applied(model: nn.Module) -> Swap | None:
    """The model's swap record, or None where no plan is applied."""
    swap: Swap | None = getattr(model, _RECORD, None)
    return swap


def apply(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    parts: Iterable[str] = (),
    form: str = "packed",
    optimizer: Optimizer | None = None,
) -> tuple[str, ...]:
    """Swap the planned linears and switch step parts on, in place; one line per change.

    ``parts``: names of ``hf.STEP_PARTS``, any of them alone or together, with a plan or without:
    ``apply(model, parts=("dropout", "packed", "cls", "fused", "words"))`` is the fast dense step.
    ``form="packed"``: units go physically and compact shapes propagate between the linears of a
    coupling. ``form="masked"``: full shapes with the mask multiplied in, the definition.
    ``optimizer``: its moments are sliced with the weights, so a running fine-tuning goes on.
    Everything is checked before anything is changed.

    Raises:
        UsageError: a plan is already applied; a module is missing, not a plain ``nn.Linear`` or
            of another shape than planned; a coupling is left without a unit; a part is unknown, in
            use already, or not possible for this model.
    """
    require_one_of(form, "form", FORMS)
    wanted = check_parts(model, parts)
    require(plan is not None or bool(wanted), "plan", "a plan, parts or both", "neither")
    if plan is None:
        return use_parts(model, wanted)
    require(applied(model) is None, "model", "no plan applied (restore first)", "one applied")
    targets = _check(model, plan)
    required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    _freeze(model, plan)
    try:  # after freezing: a prefix cache asks what is frozen
        report = list(use_parts(model, wanted))
    except BaseException:
        _thaw(model, required_grad)
        raise
    compact = {m.module: m.axis for c in plan.couplings for m in c.members} if (
        form == "packed"
    ) else {}  # fmt: skip
    originals: dict[str, nn.Module] = {}
    for name, linear in targets.items():
        new = _replacement(name, linear, plan, form, compact.get(name))
        _set_submodule(model, name, new)
        originals[name] = linear
        report.append(f"{name}: {new}")
        if optimizer is not None and isinstance(new, MaskedLinear):
            slice_optimizer(optimizer, linear, new)
    if form == "packed":
        originals |= _reshape_attention(model, plan)
    adjoin_projections(model)
    _freeze(model, plan)
    swap = Swap(
        plan=plan,
        form=form,
        originals=originals,
        required_grad=required_grad,
        report=tuple(report),
    )
    object.__setattr__(model, _RECORD, swap)
    return swap.report


def restore(model: nn.Module) -> None:
    """Put the original modules back, with what training changed merged in, and switch parts off.

    Entries that the plan dropped are as they were; without training in between the model is
    bit-equal to the one before ``apply``.
    """
    swap = applied(model)
    if swap is None and not has_parts(model):
        raise UsageError("model: expected a plan or parts applied, got none")
    if swap is not None:
        _restore_plan(model, swap)
    if has_parts(model):
        restore_parts(model)


def _restore_plan(model: nn.Module, swap: Swap) -> None:
    # Parents were swapped last and come back first.
    for name, original in reversed(list(swap.originals.items())):
        current = model.get_submodule(name)
        if isinstance(current, (MaskedLinear, SelectiveLinear)):
            _merge(swap, name, current, original)
        _set_submodule(model, name, original)
    adjoin_projections(model)
    _thaw(model, swap.required_grad)
    object.__delattr__(model, _RECORD)


@torch.no_grad()
def _merge(
    swap: Swap, name: str, current: MaskedLinear | SelectiveLinear, original: nn.Module
) -> None:
    if isinstance(current, SelectiveLinear):
        current.refresh()  # its weight is the original's own storage
        return
    merged, mask = current.to_linear(full=True), swap.plan.weight_masks[name]
    kept = mask.dense().to(merged.weight.device)
    rows = kept.any(1) if current.layout.compact_output else torch.ones_like(kept[:, 0])
    for parameter, keep in (("weight", kept), ("bias", rows)):
        target: Tensor | None = getattr(original, parameter)
        if target is not None:
            target.copy_(torch.where(keep, getattr(merged, parameter), target))


def _check(model: nn.Module, plan: Plan) -> dict[str, nn.Linear]:
    targets: dict[str, nn.Linear] = {}
    for masks in (plan.weight_masks, plan.update_masks):
        for name, mask in masks.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise UsageError(
                    f"plan: expected a model with a module {name}, got {type(model).__name__} "
                    "without it"
                ) from None
            plain = type(module) is nn.Linear
            require(plain, f"module {name}", "an nn.Linear", type(module).__name__)
            got = tuple(module.weight.shape)  # type: ignore[arg-type]
            require(got == mask.shape, f"plan: {name}", f"a weight {list(mask.shape)}", list(got))
            targets[name] = module  # type: ignore[assignment]
    for coupling in plan.couplings:
        kept = int(plan.kept_units(coupling).sum())
        require(kept > 0, f"plan: {coupling.name}", "at least one kept unit", kept)
    known = {name for name, _ in model.named_parameters()}
    unknown = [name for name in plan.trainable or () if name not in known]
    require(not unknown, "plan trainable", "names of the model's parameters", unknown[:3])
    return targets


def _replacement(
    name: str, linear: nn.Linear, plan: Plan, form: str, axis: int | None
) -> MaskedLinear | SelectiveLinear:
    weight_mask, update_mask = plan.weight_masks.get(name), plan.update_masks.get(name)
    if weight_mask is not None and update_mask is not None:
        raise UsageError(f"plan: {name}: expected one of weight_mask and update_mask, got both")
    if update_mask is not None:
        return SelectiveLinear.from_linear(linear, update_mask)
    assert weight_mask is not None
    return MaskedLinear.from_linear(
        linear,
        weight_mask,
        compact_input=axis == 1,
        compact_output=axis == 0,
        backend="reference" if form == "masked" else "auto",
    )


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _reshape_attention(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Give attention modules trimmed by dimension their own head sizes."""
    sizes: dict[str, dict[str, int]] = {}
    for coupling in plan.couplings:
        if coupling.kind in ("qk", "vo"):
            name = _attention_name(coupling)
            sizes.setdefault(name, {})[coupling.kind] = (
                int(plan.kept_units(coupling).sum()) // coupling.heads
            )
    originals: dict[str, nn.Module] = {}
    for name, size in sizes.items():
        from sensikernels.hf.modeling import TrimmedSelfAttention

        originals[name] = model.get_submodule(name)
        new = TrimmedSelfAttention.around(originals[name], size["qk"], size["vo"])
        _set_submodule(model, name, new)
    return originals


def _attention_name(coupling: Coupling) -> str:
    rows = next(m.module for m in coupling.members if m.axis == 0)
    part = "query" if coupling.kind == "qk" else "value"
    return rows.removesuffix(PARTS[part]) + "attention.self"


def _freeze(model: nn.Module, plan: Plan) -> None:
    if plan.trainable is None:
        return
    trained = set(plan.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _thaw(model: nn.Module, required_grad: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required_grad[name])
