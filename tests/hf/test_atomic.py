"""``apply`` and ``restore`` are all or nothing: each step of them fails once, and nothing stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import applied, apply, aside, features, restore, swap
from sensikernels.hf import optimizer as following
from sensikernels.hf.features import has_features
from sensikernels.masks import Mask, Plan
from tests.hf.conftest import make_batch, make_model
from tests.hf.test_following import PER_ENTRY, step
from tests.hf.test_module_state import FIRST, LAST, plans, snapshot

FEATURES = ("dropout", "packed", "cls", "fused", "words")
STEPS = {
    "check a linear": (swap, "check_linear"),
    "build a layer": (swap, "exchange"),
    "stage the optimizer": (following, "staged"),
    "carry hooks": (aside, "carry"),
    "map a gradient": (aside, "_moved_grad"),
    "settle a layer": (swap, "settle"),
    "set a layer": (swap, "_set_submodule"),
    "resize heads": (swap, "_set_attention"),
    "freeze": (swap, "_freeze"),
    "switch features on": (swap, "use_features"),
    "switch dropout on": (features, "use_counter_dropout"),
    "switch packing on": (features, "use_packed"),
    "commit to the optimizer": (following, "commit"),
}
BACK = {
    **{
        name: STEPS[name]
        for name in (
            "stage the optimizer",
            "map a gradient",
            "settle a layer",
            "set a layer",
            "commit to the optimizer",
        )
    },
    "give requires_grad back": (swap, "_require_grad"),
}


class Broken(Exception):
    """The error of the step that fails."""


def failing(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = 0

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Broken
        return function(*arguments, **named)

    return fail


def of_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    state = {
        id(p): {k: v.numpy().tobytes() if torch.is_tensor(v) else v for k, v in own.items()}
        for p, own in optimizer.state.items()
    }
    return groups, state


def prepared(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(dropout=0.1)
    optimizer = PER_ENTRY[name](model.parameters())
    step(model, optimizer)
    model(**make_batch()).loss.backward()  # gradients are there, too
    return model, optimizer


@pytest.mark.parametrize("name", ["AdamW", "SubsetAdamW"])
@pytest.mark.parametrize("kind", ["dimensions", "blocks"])
@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("what", STEPS)
def test_a_step_of_apply_that_fails_leaves_nothing(
    what: str, after: int, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = prepared(name)
    made = {**plans(model), "dimensions": by_dimensions(model)}[kind]
    before = snapshot(model), of_optimizer(optimizer)
    home, function = STEPS[what]
    monkeypatch.setattr(home, function, failing(getattr(home, function), after))
    failed = False
    try:
        apply(model, made, features=FEATURES, optimizer=optimizer)
    except Broken:
        failed = True
        monkeypatch.undo()
        assert applied(model) is None
        assert not has_features(model)
        assert (snapshot(model), of_optimizer(optimizer)) == before
        apply(model, made, features=FEATURES, optimizer=optimizer)
    monkeypatch.undo()
    assert failed or after > 1 or kind == "blocks"
    restore(model, optimizer=optimizer)


@pytest.mark.parametrize("what", BACK)
@pytest.mark.parametrize("after", [1, 3])
def test_a_step_of_restore_that_fails_leaves_the_plan(
    what: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = prepared("AdamW")
    made = plans(model)["trim"]
    apply(model, made, optimizer=optimizer)
    step(model, optimizer)
    record = applied(model)
    before = snapshot(model), of_optimizer(optimizer)
    home, function = BACK[what]
    monkeypatch.setattr(home, function, failing(getattr(home, function), after))
    try:
        restore(model, optimizer=optimizer)
    except Broken:
        monkeypatch.undo()
        assert applied(model) is record
        assert (snapshot(model), of_optimizer(optimizer)) == before
        restore(model, optimizer=optimizer)
    assert applied(model) is None


def by_dimensions(model: nn.Module) -> Plan:
    from tests.hf.test_swap import make_plan

    return make_plan(model, granularity="dimensions")


def columns(model: nn.Module) -> Plan:
    shape = tuple(model.get_submodule(FIRST).weight.shape)
    return Plan(method="x", weight_masks={FIRST: Mask.columns(torch.arange(48) > 3, shape)})


def wrong(made: Plan, kind: str) -> Plan:
    masks = dict(made.weight_masks)
    if kind == "both":
        return Plan(method="x", weight_masks=masks, update_masks=masks)
    if kind == "trainable":
        return Plan(method="x", weight_masks=masks, trainable=("nothing",))
    if kind == "module":
        masks["nothing"] = masks[FIRST]
    if kind == "shape":
        masks[LAST] = Mask.rows(torch.ones(5).bool(), (5, 5))
    return Plan(method="x", weight_masks=masks)


WRONG = {
    "both": "one of weight_mask and update_mask",
    "trainable": "names of the model's parameters",
    "module": "a model with a module nothing",
    "shape": r"a weight \[5, 5\], got",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_the_last_of_a_plan_is_found_first(kind: str) -> None:
    model, optimizer = prepared("SubsetAdamW")
    before = snapshot(model), of_optimizer(optimizer)
    with pytest.raises(UsageError, match=WRONG[kind]):
        apply(model, wrong(columns(model), kind), features=FEATURES, optimizer=optimizer)
    assert (snapshot(model), of_optimizer(optimizer)) == before


def test_a_part_that_cannot_be_had_takes_the_plan_back() -> None:
    model, optimizer = prepared("AdamW")
    before = snapshot(model), of_optimizer(optimizer)
    for wanted in (("prefix-cache",), ("packed", "labelled")):
        with pytest.raises(UsageError):
            apply(model, columns(model), features=wanted, optimizer=optimizer)
        assert (snapshot(model), of_optimizer(optimizer)) == before
