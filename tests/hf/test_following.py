"""Optimizers follow a plan: they hold what trains, with the moments of what stays."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels import SubsetAdamW
from sensikernels._core.errors import UsageError
from sensikernels.hf import applied, apply, restore
from sensikernels.masks import Plan
from tests.hf.conftest import make_batch, make_model
from tests.hf.test_module_state import FIRST, LAST, plans, snapshot

transformers = pytest.importorskip("transformers")

PER_ENTRY: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "SubsetAdamW": lambda p: SubsetAdamW(p, lr=0.01),
}
FACTORED: dict[str, Callable[[Any], Optimizer]] = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers Adafactor": lambda p: transformers.Adafactor(
        p, lr=0.01, relative_step=False, scale_parameter=False
    ),
}


def step(model: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    model(**make_batch(seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def trained(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


def begun(optimizer_of: Callable[..., Any], kind: str) -> tuple[Any, Plan, Any]:
    """A model, a plan of that kind for it, and its optimizer after one step."""
    model = make_model()
    made = plans(model)[kind]
    optimizer = optimizer_of(model.parameters())
    step(model, optimizer)
    return model, made, optimizer


def entries(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """State tensors as large as the parameter."""
    state = optimizer.state[parameter].items()
    return {k: v for k, v in state if torch.is_tensor(v) and v.shape == parameter.shape}


@pytest.mark.parametrize("kind", ["trim", "rows", "blocks", "elements"])
@pytest.mark.parametrize("name", PER_ENTRY)
def test_moments_go_with_their_entries_there_and_back(name: str, kind: str) -> None:
    model, made, optimizer = begun(PER_ENTRY[name], kind)
    step(model, optimizer, 1)
    linear = model.get_submodule(FIRST)
    # A state made of the weight itself shows where each entry goes.
    marks = list(entries(optimizer, linear.weight))
    for key in marks:
        optimizer.state[linear.weight][key].copy_(linear.weight.detach().abs())
    weight = linear.weight.detach().clone()
    apply(model, made, optimizer=optimizer)
    assert held(optimizer) == trained(model)
    layer = model.get_submodule(FIRST)
    values = layer.values if FIRST in made.update_masks else layer.weight
    for key in marks:
        assert torch.equal(optimizer.state[values][key], values.detach().abs()), key
    step(model, optimizer, 2)
    after = {key: optimizer.state[values][key].clone() for key in marks}
    restore(model, optimizer=optimizer)
    assert held(optimizer) == trained(model)
    mask = (made.update_masks if FIRST in made.update_masks else made.weight_masks)[FIRST].dense()
    for key in marks:
        back = optimizer.state[linear.weight][key]
        now = after[key][after[key] != 0].sort()[0]  # blocks reach over the weight's edge
        assert torch.equal(back[mask][back[mask] != 0].sort()[0], now)
        assert not back[~mask].any()
    step(model, optimizer, 3)
    assert not torch.equal(linear.weight[mask], weight[mask])


@pytest.mark.parametrize("kind", ["trim", "rows"])
@pytest.mark.parametrize("name", FACTORED)
def test_factored_moments_are_cut_by_rows_and_columns(name: str, kind: str) -> None:
    model, made, optimizer = begun(FACTORED[name], kind)
    weight = model.get_parameter(f"{FIRST}.weight")
    mask = (made.update_masks if FIRST in made.update_masks else made.weight_masks)[FIRST].dense()
    names = ("row_var", "col_var") if name == "Adafactor" else ("exp_avg_sq_row", "exp_avg_sq_col")
    before = [optimizer.state[weight][key].clone() for key in names]
    apply(model, made, optimizer=optimizer)
    layer = model.get_submodule(FIRST)
    values = layer.values if FIRST in made.update_masks else layer.weight
    for key, was, kept in zip(names, before, (mask.any(1), mask.any(0)), strict=True):
        assert torch.equal(optimizer.state[values][key].flatten(), was.flatten()[kept])
    step(model, optimizer, 1)
    restore(model, optimizer=optimizer)
    step(model, optimizer, 2)
    assert held(optimizer) == trained(model)


# Not Rprop: it goes by the sign of gradients that are zero but for rounding.
@pytest.mark.parametrize("name", sorted(PER_ENTRY.keys() - {"Rprop"}))
def test_a_step_after_apply_is_that_of_the_kept_entries(name: str) -> None:
    """The trimmed model and the masked one move alike, where the optimizer works by entry."""
    model = make_model().double()
    made = plans(model)["trim"]
    twin = copy.deepcopy(model)
    optimizers = [PER_ENTRY[name](m.parameters()) for m in (model, twin)]
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        step(one, optimizer)
        apply(one, made, form="compact" if one is model else "masked", optimizer=optimizer)
        for seed in (1, 2):
            step(one, optimizer, seed)
        restore(one, optimizer=optimizer)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        mask = made.weight_masks.get(name.rpartition(".")[0])
        if mask is None:
            kept = torch.ones_like(one, dtype=torch.bool)
        else:  # momentum still moves what the masked form has of a dropped unit's bias
            kept = mask.dense() if name.endswith("weight") else mask.dense().any(1)
        torch.testing.assert_close(one[kept], other[kept], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["rows", "blocks", "elements", "trim"])
def test_trimmed_state_of_a_subset_goes_along(kind: str) -> None:
    model = make_model()
    optimizer = SubsetAdamW(model.parameters(), lr=0.01)
    weight = model.get_parameter(f"{FIRST}.weight")
    step(model, optimizer)
    optimizer.set_kept(weight, ("rows", torch.arange(0, 32, 3, dtype=torch.int32)))
    step(model, optimizer, 1)
    allowed = torch.arange(32) % 3 == 0
    made = plans(model)[kind]
    apply(model, made, optimizer=optimizer)
    before = model.state_dict()[f"{FIRST}.weight"].clone()
    step(model, optimizer, 2)
    restore(model, optimizer=optimizer)
    step(model, optimizer, 3)
    if kind == "rows":
        moved = (model.get_parameter(f"{FIRST}.weight") != before).any(1)
        assert not moved[~allowed & (torch.arange(32) % 2 == 0)].any()
    assert held(optimizer) == trained(model)


@pytest.mark.parametrize("name", ["AdamW", "SubsetAdamW", "Adafactor"])
def test_an_optimizer_over_the_trainable_parameters_only(name: str) -> None:
    model = make_model()
    for parameter in model.get_submodule("bert.encoder.layer.0").parameters():
        parameter.requires_grad_(False)
    make = {**PER_ENTRY, **FACTORED}[name]
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    made = plans(model)["trim"]
    step(model, optimizer)
    apply(model, made, optimizer=optimizer)
    assert held(optimizer) == trained(model)
    step(model, optimizer, 1)
    restore(model, optimizer=optimizer)
    assert held(optimizer) == trained(model)
    step(model, optimizer, 2)


@pytest.mark.parametrize("name", ["AdamW", "SubsetAdamW"])
def test_what_a_plan_freezes_leaves_and_comes_back_to_its_group(name: str) -> None:
    model = make_model()
    named = dict(model.named_parameters())
    plain = [p for n, p in named.items() if n.endswith("bias")]
    rest = [p for n, p in named.items() if not n.endswith("bias")]
    optimizer = PER_ENTRY[name]([{"params": rest}, {"params": plain, "weight_decay": 0.0}])
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    step(model, optimizer)
    apply(
        model,
        Plan(method="x", trainable=(f"{FIRST}.bias", "classifier.weight")),
        optimizer=optimizer,
    )
    assert (
        held(optimizer)
        == trained(model)
        == {id(named[f"{FIRST}.bias"]), id(named["classifier.weight"])}
    )
    assert set(optimizer.state) == {named[f"{FIRST}.bias"], named["classifier.weight"]}
    step(model, optimizer, 1)
    restore(model, optimizer=optimizer)
    after = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert after == [set(group) for group in groups]
    step(model, optimizer, 2)


def test_what_a_plan_thaws_joins_its_kind() -> None:
    model = make_model()
    model.get_submodule("bert").requires_grad_(False)
    head = model.get_submodule("classifier")
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0.0}], lr=0.01
    )
    names = (f"{FIRST}.bias", f"{FIRST}.weight", "classifier.weight")
    made = replace(plans(model)["rows"], trainable=names)
    apply(model, made, optimizer=optimizer)
    layer = model.get_submodule(FIRST)
    assert held(optimizer) == trained(model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert any(p is layer.values for p in optimizer.param_groups[0]["params"])
    before = layer.values.detach().clone()
    step(model, optimizer)
    assert not torch.equal(before, layer.values)


def test_accelerates_wrapper_is_looked_into() -> None:
    from accelerate import Accelerator

    model = make_model()
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters()))
    step(model, optimizer)
    apply(model, plans(model)["trim"], optimizer=optimizer)
    assert held(optimizer) == trained(model)
    step(model, optimizer)


def lbfgs(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**make_batch()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state.pop(next(model.parameters()))
    optimizer.state[model.get_parameter(f"{LAST}.weight")] = state
    return optimizer


def strange(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    optimizer.state[model.get_parameter(f"{LAST}.weight")]["absmax"] = torch.ones(7)
    return optimizer


def blocks_of_factors(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer)
    return optimizer


@pytest.mark.parametrize("make", [lbfgs, strange])
def test_unknown_state_is_refused_before_anything_changes(make: Any) -> None:
    model = make_model()
    made = plans(model)["trim"]
    optimizer = make(model)
    before = snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UsageError, match="optimizer: bert.*state of the parameter's shape"):
        apply(model, made, optimizer=optimizer)
    assert applied(model) is None
    assert snapshot(model) == before[0]
    assert str(optimizer.state_dict()) == str(before[1])


def test_factors_of_what_are_no_rows_are_refused() -> None:
    model = make_model()
    optimizer = blocks_of_factors(model)
    before = snapshot(model)
    with pytest.raises(UsageError, match="factored by rows and columns, got row_var"):
        apply(model, plans(model)["blocks"], optimizer=optimizer)
    assert snapshot(model) == before


def test_what_is_no_optimizer_is_refused() -> None:
    model = make_model()
    with pytest.raises(UsageError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        apply(model, plans(model)["trim"], optimizer=[])  # type: ignore[arg-type]
    assert applied(model) is None


@pytest.mark.parametrize("kind", ["trim", "rows"])
@pytest.mark.parametrize("name", ["AdamW", "SubsetAdamW"])
def test_an_optimizer_that_was_not_passed_warns_once(name: str, kind: str) -> None:
    model = make_model()
    optimizer = PER_ENTRY[name](model.parameters())
    step(model, optimizer)
    apply(model, plans(model)[kind])
    with pytest.warns(UserWarning, match="pass it, as in sensikernels.apply"):
        step(model, optimizer)
    other = PER_ENTRY[name](model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        step(model, other)
    restore(model, optimizer=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, other)
        step(model, optimizer)  # it has the same Parameters again
    apply(model, plans(model)[kind])
    restore(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_a_step_time_budgets_own_copies_do_not_warn() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    made = plans(model)["trim"]
    twin = copy.deepcopy(model)
    apply(twin, made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


@pytest.mark.parametrize("name", ["AdamW", "SubsetAdamW"])
def test_after_freezing_and_thawing_state_fits_a_fresh_optimizer(name: str) -> None:
    """Groups keep the model's order, so a resumed run, which froze once, loads what is saved."""
    model, fresh = make_model(), make_model()
    optimizers = [PER_ENTRY[name](one.parameters()) for one in (model, fresh)]
    names = [n for n, _ in model.named_parameters()]
    last = names[::2]
    for seed, trainable in enumerate((names[3:9], names[1::3], names[::-1][:7], last)):
        apply(model, Plan(method="x", trainable=tuple(trainable)), optimizer=optimizers[0])
        step(model, optimizers[0], seed)
        if trainable is not last:
            restore(model, optimizer=optimizers[0])
    held_names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert held_names == last
    params = dict(model.named_parameters())
    assert optimizers[0].param_groups[0]["params"] == [params[n] for n in last]
    apply(fresh, Plan(method="x", trainable=tuple(last)), optimizer=optimizers[1])
    fresh.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for one, optimizer in zip((model, fresh), optimizers, strict=True):
        step(one, optimizer, 9)
    for (name, one), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name
