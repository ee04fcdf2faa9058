"""State of a user's stays on a model, through copies, casts, loads, apply, restore and compact."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply, class_of, compact, restore, sensitivity
from sensikernels.masks import Budget, Mask, Plan, plan
from tests.hf.conftest import make_batch, make_model
from tests.hf.test_swap import make_plan

FIRST, LAST = (f"bert.encoder.layer.{i}.output.dense" for i in range(2))
FAST = ("dropout", "packed", "cls", "fused", "words")


def pickled(model: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(model))
    return twin


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin: nn.Module = torch.load(file, weights_only=False)
    return twin


def assigned(model: nn.Module) -> nn.Module:
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "assign": assigned,
    "assigned copy": lambda model: assigned(copy.deepcopy(model)),
    "double": nn.Module.double,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half and back": lambda model: model.half().float(),
    "on meta and back": lambda model: assigned_from_meta(model),
    "shared memory": nn.Module.share_memory,
}


def assigned_from_meta(model: nn.Module) -> nn.Module:
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    model.to_empty(device="meta")
    model.load_state_dict(state, assign=True)
    for name, buffer in buffers.items():
        stem, _, leaf = name.rpartition(".")
        model.get_submodule(stem)._buffers[leaf] = buffer
    return model


def plans(model: nn.Module) -> dict[str, Plan]:
    shape = tuple(model.get_submodule(FIRST).weight.shape)
    rows = Mask.rows(torch.arange(shape[0]) % 2 == 0, shape)
    grid = torch.arange(8 * 12).view(8, 12) % 5 > 0
    blocks = Mask.blocks(grid, (4, 4), shape)
    elements = Mask.elements(torch.arange(shape[0] * shape[1]).view(shape) % 3 > 0)
    return {
        "trim": make_plan(model),
        "rows": Plan(method="x", update_masks={FIRST: rows, LAST: rows}),
        "blocks": Plan(method="x", update_masks={FIRST: blocks}, weight_masks={LAST: blocks}),
        "elements": Plan(method="x", update_masks={FIRST: elements}, weight_masks={LAST: elements}),
        "biases": Plan(method="x", trainable=(f"{FIRST}.bias",)),
    }


def train(model: nn.Module, steps: int = 2) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for seed in range(steps):
        model(**make_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["trim", "rows", "blocks", "elements", "biases"])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_trained_is_restored_whatever_came_between(kind: str, way: str) -> None:
    model = make_model()
    made = plans(model)[kind]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    apply(model, made)
    model = WAYS[way](model)
    train(model)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    restore(model)
    after = model.state_dict()
    assert list(after) == list(before)
    moved = 0
    for name, value in after.items():
        stem = name.rpartition(".")[0]
        mask = made.weight_masks.get(stem)
        if mask is None:
            assert torch.equal(value, trained[name]), name
        elif name.endswith("weight"):
            kept = mask.dense()
            assert torch.equal(value[~kept], before[name].to(value.dtype)[~kept]), name
            entries = trained[name].flatten()
            if kind == "blocks":
                entries = entries[entries != 0]  # what reaches over the weight's edge
            assert torch.equal(value[kept].sort()[0], entries.sort()[0])
        moved += not torch.equal(value, before[name].to(value.dtype))
    assert moved > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [(), FAST])
def test_compact_holds_what_was_trained_whatever_came_between(
    way: str, features: tuple[str, ...]
) -> None:
    model, batch = make_model(), make_batch()
    apply(model, make_plan(model), features=features)
    model = WAYS[way](model)
    if not features:  # SGD takes no row-sparse gradient with a table of low precision
        train(model)
    model.eval()
    small = compact(model)
    assert next(small.parameters()).dtype == next(model.parameters()).dtype
    close = 1e-5 if next(model.parameters()).itemsize > 2 else 0.05
    ours, wanted = small(**batch).logits, model(**batch).logits
    torch.testing.assert_close(ours, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("features", [("packed",), FAST])
def test_changed_models_stay_their_class(way: str, features: tuple[str, ...]) -> None:
    from transformers import BertForSequenceClassification, BertModel

    for model in (make_model(), make_model().bert):
        kind = type(model)
        apply(model, features=features)
        twin = WAYS[way](model)
        for changed in (model, twin):
            bert = getattr(changed, "bert", changed)
            assert isinstance(bert, BertModel)
            assert type(bert).__name__ == "BertModel"
            assert type(bert).__module__ == BertModel.__module__
            assert class_of(bert) is BertModel
            assert isinstance(changed, kind)
        restore(twin)
        assert type(getattr(twin, "bert", twin)) is BertModel
        assert type(getattr(model, "bert", model)) is not BertModel
    assert kind is not BertForSequenceClassification


def test_a_saved_config_names_the_class_it_was(tmp_path: Any) -> None:
    model = make_model().bert
    apply(model, features=FAST)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"BertModel"' in text
    assert "Packed" not in text
    back = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


def test_hooks_modes_attributes_and_gradients_stay_with_their_place() -> None:
    model, batch = make_model(), make_batch()
    calls: list[str] = []
    linear = model.get_submodule(FIRST)
    handles = [
        linear.register_forward_hook(lambda m, i, o: calls.append("forward")),
        linear.register_forward_pre_hook(lambda m, i: calls.append("pre")),
        linear.register_full_backward_hook(lambda m, i, o: calls.append("backward")),
    ]
    linear.note = {"kept": 1}
    model.train()
    linear.eval()
    model(**batch).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    made = make_plan(make_model())
    calls.clear()
    apply(model, made)
    layer = model.get_submodule(FIRST)
    assert layer.note is linear.note
    assert not layer.training
    kept = made.weight_masks[FIRST].grid.flatten()
    assert torch.equal(layer.weight.grad, grads[f"{FIRST}.weight"][:, kept])
    model(**batch).loss.backward()
    assert calls == ["pre", "forward", "backward"]
    handles.pop().remove()
    layer.register_forward_hook(lambda m, i, o: calls.append("later"))
    layer.more = 2
    layer.train()
    calls.clear()
    restore(model)
    back = model.get_submodule(FIRST)
    assert back is linear
    assert (back.note, back.more, back.training) == ({"kept": 1}, 2, True)
    model(**batch).loss.backward()
    assert calls == ["pre", "forward", "later"]


def test_parameters_are_the_same_objects_after_restore() -> None:
    model = make_model()
    before = list(model.parameters())
    modules = list(model.modules())
    for made in plans(model).values():
        apply(model, made)
        restore(model)
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("criterion", ["mask-gradient", "learned", "first-order", "magnitude"])
def test_ranking_leaves_everything_as_it_was(criterion: str) -> None:
    model, batch = make_model(dropout=0.1), make_batch()
    model.train()
    model.get_submodule("bert.embeddings").eval()
    model.get_submodule(FIRST).eval()
    model.get_parameter("classifier.weight").requires_grad_(False)
    model(**batch).loss.backward()
    torch.manual_seed(3)
    before = snapshot(model)
    sensitivity(model, [batch, batch], criterion)
    assert snapshot(model) == before


def test_applying_and_compacting_draw_no_random_number() -> None:
    model = make_model()
    made = make_plan(model)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    apply(model, made, features=("packed",))
    compact(model)
    restore(model)
    assert torch.equal(torch.get_rng_state(), state)


def snapshot(model: nn.Module) -> list[Any]:
    """All that a user could see, as plain values."""
    return [
        {n: m.training for n, m in model.named_modules()},
        {n: type(m) for n, m in model.named_modules()},
        {
            n: (
                p.requires_grad,
                p.detach().numpy().tobytes(),
                None if p.grad is None else p.grad.to_dense().numpy().tobytes(),
            )
            for n, p in model.named_parameters()
        },
        {
            n: [len(getattr(m, h)) for h in vars(m) if h.endswith("_hooks")]
            for n, m in model.named_modules()
        },
        {n: sorted(vars(m)) for n, m in model.named_modules()},
        torch.get_rng_state().numpy().tobytes(),
        model.config._attn_implementation,
    ]


def test_compact_carries_what_was_switched_on() -> None:
    model, batch = make_model(), make_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.get_submodule("bert.encoder.layer.1").eval()
    model.get_parameter("classifier.bias").requires_grad_(False)
    model.get_submodule("classifier").note = "mine"
    seen: list[int] = []
    model.get_submodule(FIRST).register_forward_hook(lambda m, i, o: seen.append(1))
    model.set_attn_implementation("eager")
    apply(model, make_plan(make_model()), features=("dropout",))
    small = compact(model)
    assert small.is_gradient_checkpointing
    assert {n: m.training for n, m in small.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }
    assert not small.get_parameter("classifier.bias").requires_grad
    assert small.get_submodule("classifier").note == "mine"
    assert small.config._attn_implementation == "eager"
    small(**batch).loss.backward()
    assert seen
    assert "_sensikernels_swap" not in vars(small)


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.get_submodule(LAST))


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.get_submodule(LAST), "weight", 0.5)


def shared(model: nn.Module) -> None:
    model.get_submodule(LAST).weight = model.get_submodule(FIRST).weight


def hooked_parameter(model: nn.Module) -> None:
    model.get_submodule(LAST).weight.register_post_accumulate_grad_hook(lambda p: None)


def other_forward(model: nn.Module) -> None:
    linear = model.get_submodule(LAST)
    linear.forward = lambda x: nn.Linear.forward(linear, x)


def taken_attribute(model: nn.Module) -> None:
    model.get_submodule(LAST).mask = 1


def subclass(model: nn.Module) -> None:
    class Own(nn.Linear):
        pass

    model.get_submodule(LAST).__class__ = Own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (parametrized, "expected an nn.Linear, got a .*Parametrized"),
        (pruned, "remove pruning"),
        (shared, "expected Parameters of its own, got shared"),
        (hooked_parameter, "expected no hooks on the parameter"),
        (other_forward, "got another forward on the instance"),
        (taken_attribute, r"got \['mask'\]"),
        (subclass, "expected an nn.Linear, got a .*Own"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(change: Any, said: str) -> None:
    model = make_model()
    made = make_plan(model)
    change(model)
    before = snapshot(model)
    with pytest.raises(UsageError, match=said) as caught:
        apply(model, made)
    assert LAST in str(caught.value)
    assert snapshot(model) == before


def test_a_layer_exchanged_by_somebody_else_is_not_restored_over() -> None:
    model = make_model()
    apply(model, make_plan(model))
    model.get_submodule("bert.encoder.layer.1.output").dense = nn.Linear(4, 32)
    before = snapshot(model)
    with pytest.raises(UsageError, match="expected the layer that apply put there, got Linear"):
        restore(model)
    assert snapshot(model) == before


def test_saving_a_trimmed_model_warns_once(tmp_path: Any, recwarn: Any) -> None:
    model = make_model()
    apply(model, Plan(method="x", trainable=("classifier.bias",)))
    model.save_pretrained(tmp_path / "frozen")
    restore(model)
    assert not [w for w in recwarn if "save_pretrained" in str(w.message)]
    apply(model, make_plan(model))
    with pytest.warns(UserWarning, match=r"save sensikernels.compact\(model\) instead"):
        model.save_pretrained(tmp_path / "trimmed")
    recwarn.clear()
    model.save_pretrained(tmp_path / "trimmed")
    compact(model).save_pretrained(tmp_path / "compact")
    restore(model)
    model.save_pretrained(tmp_path / "whole")
    assert not [w for w in recwarn if "save_pretrained" in str(w.message)]


def test_a_budget_of_a_restored_model_is_met_again() -> None:
    model, batch = make_model(), make_batch()
    made = make_plan(model)
    for _ in range(2):
        apply(model, made)
        wanted = model(**batch).logits
        restore(model)
    apply(
        model,
        plan(
            sensitivity(model, [batch]),
            Budget(flops=0.9),
            multiples={"neurons": 4},
            minimums={"neurons": 4},
        ),
    )
    restore(model)
    apply(model, made)
    assert torch.equal(model(**batch).logits, wanted)
