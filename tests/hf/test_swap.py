"""Trimmed equals masked; what is applied can be taken back to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import applied, apply, compact, measured_flops, restore, sensitivity
from sensikernels.masks import Budget, Mask, Plan, plan
from sensikernels.nn import MaskedLinear, SelectiveLinear
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model

SMALL = {"neurons": 4, "dimensions": 2}


def make_plan(model: nn.Module, task: str = "classification", granularity: str = "heads") -> Plan:
    scores = sensitivity(model, [make_batch(task)], granularity=granularity)
    return plan(scores, Budget(flops=0.5), multiples=SMALL, minimums=SMALL)


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    got = model(**batch)
    return got.loss, got[1]


@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
def test_trimmed_is_masked(task: str, granularity: str) -> None:
    model, batch = make_model(task).double(), make_batch(task)
    made = make_plan(model, task, granularity)
    twin = copy.deepcopy(model)
    apply(model, made, form="masked")
    apply(twin, made)
    masked, trimmed = outputs(model, batch), outputs(twin, batch)
    torch.testing.assert_close(trimmed, masked, rtol=1e-12, atol=1e-13)
    masked[0].backward()
    trimmed[0].backward()
    for name, parameter in twin.named_parameters():
        wanted = model.get_parameter(name).grad
        assert wanted is not None
        module = twin.get_submodule(name.rpartition(".")[0])
        if isinstance(module, MaskedLinear):
            wanted = cut(wanted, module, name)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12)
    assert measured_flops(made, twin, batch).ratio == pytest.approx(made.flops_ratio, rel=0.02)


def cut(wanted: torch.Tensor, module: MaskedLinear, name: str) -> torch.Tensor:
    """The kept part of a gradient that the masked form has at full or packed size."""
    if wanted.shape == module.get_parameter(name.rpartition(".")[2]).shape:
        return wanted
    rows, columns = module.layout.rows, module.layout.columns
    wanted = wanted if rows is None else wanted[rows.long()]
    return wanted if columns is None or wanted.ndim == 1 else wanted[:, columns.long()]


@pytest.mark.parametrize("form", ["compact", "masked"])
@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
def test_apply_then_restore_is_bit_equal(form: str, granularity: str) -> None:
    model, batch = make_model(), make_batch()
    made = replace(make_plan(model, granularity=granularity), trainable=("classifier.weight",))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    loss = outputs(model, batch)[0]
    report = apply(model, made, form=form)
    assert len(report) == 12
    assert applied(model) is not None
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.weight"]
    restore(model)
    assert applied(model) is None
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(outputs(model, batch)[0], loss)


def test_restore_merges_what_was_trained() -> None:
    model, batch = make_model(), make_batch()
    made = make_plan(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    apply(model, made)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs(model, batch)[0].backward()
    optimizer.step()
    logits = outputs(model, batch)[1]
    restore(model)
    name = "bert.encoder.layer.0.intermediate.dense"
    kept = made.weight_masks[name].dense()
    weight = model.get_parameter(f"{name}.weight")
    old = before[f"{name}.weight"]
    assert torch.equal(weight[~kept], old[~kept])
    assert not torch.equal(weight[kept], old[kept])
    apply(model, made)
    torch.testing.assert_close(outputs(model, batch)[1], logits)


@pytest.mark.parametrize("kind", ["torch", "subset"])
def test_moments_are_sliced_with_the_weights(kind: str) -> None:
    model = make_model()
    made = make_plan(model)
    make = torch.optim.AdamW if kind == "torch" else SubsetAdamW
    optimizer = make(model.parameters(), lr=1e-3)
    for seed in range(3):
        outputs(model, make_batch(seed=seed))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    name = "bert.encoder.layer.1.output.dense"
    old = model.get_parameter(f"{name}.weight")
    moments = {k: v.clone() for k, v in optimizer.state[old].items() if torch.is_tensor(v)}
    shape = old.shape
    apply(model, made, optimizer=optimizer)
    new = model.get_parameter(f"{name}.weight")
    columns = made.weight_masks[name].grid.flatten()
    assert 0 < int(columns.sum()) < len(columns)
    for key in ("exp_avg", "exp_avg_sq"):
        got = optimizer.state[new][key].reshape(new.shape)
        assert torch.equal(got, moments[key].reshape(shape)[:, columns])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    outputs(model, make_batch())[0].backward()
    optimizer.step()


def test_update_masks_make_selective_layers() -> None:
    model, batch = make_model(), make_batch()
    name = "bert.encoder.layer.0.intermediate.dense"
    mask = Mask.rows(torch.arange(48) % 4 == 0, (48, 32))
    before = model.get_parameter(f"{name}.weight").clone()
    apply(model, Plan(method="rows", update_masks={name: mask}))
    layer = model.get_submodule(name)
    assert isinstance(layer, SelectiveLinear)
    outputs(model, batch)[0].backward()
    torch.optim.SGD([layer.values], lr=1.0).step()
    restore(model)
    after = model.get_parameter(f"{name}.weight")
    changed = (before != after).any(1)
    assert torch.equal(changed, mask.grid.flatten())


@pytest.mark.parametrize("task_name", ["classification", "answering"])
@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_round_trips_bit_equal(
    task_name: str, granularity: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    model, batch = make_model(task_name).to(dtype).eval(), make_batch(task_name)
    apply(model, make_plan(model, task_name, granularity))
    small = compact(model)
    assert not any(isinstance(m, MaskedLinear) for m in small.modules())
    wanted = outputs(model, batch)
    assert torch.equal(outputs(small, batch)[1], wanted[1])
    small.save_pretrained(tmp_path)
    auto = {
        "classification": transformers.AutoModelForSequenceClassification,
        "answering": transformers.AutoModelForQuestionAnswering,
    }[task_name]
    back = auto.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(back) is type(small)
    assert torch.equal(outputs(back, batch)[1], wanted[1])
    again = plan(
        sensitivity(back, [batch], granularity="dimensions"),
        Budget(flops=0.8),
        multiples={"neurons": 2, "dimensions": 1},
        minimums={"neurons": 2, "dimensions": 1},
    )
    apply(back, again)
    assert sum(p.numel() for p in compact(back).parameters()) < sum(
        p.numel() for p in small.parameters()
    )


def test_compact_refuses() -> None:
    model = make_model()
    with pytest.raises(UsageError, match="expected a plan applied, got none"):
        compact(model)
    apply(model, make_plan(model), form="masked")
    with pytest.raises(UsageError, match="applied as 'compact', got 'masked'"):
        compact(model)


def test_wrong_plans_change_nothing() -> None:
    model, other = make_model(), make_model(intermediate_size=64)
    made = make_plan(other)
    with pytest.raises(UsageError, match=r"plan: bert.* a weight \[64, 32\], got \[48, 32\]"):
        apply(model, made)
    deep = make_plan(make_model(num_hidden_layers=3))
    with pytest.raises(UsageError, match="expected a model with a module"):
        apply(model, deep)
    with pytest.raises(UsageError, match="names of the model's parameters"):
        apply(model, Plan(method="x", trainable=("nothing",)))
    assert applied(model) is None
    assert not any(isinstance(m, MaskedLinear) for m in model.modules())
    apply(model, make_plan(model))
    with pytest.raises(UsageError, match="restore first"):
        apply(model, made)
    restore(model)
    with pytest.raises(UsageError, match="expected a plan or features applied, got none"):
        restore(model)


@pytest.mark.parametrize(
    ("width", "heads", "neurons"), [(768, 12, 3072), (384, 12, 1536), (1024, 16, 4096)]
)
def test_real_widths_with_the_default_multiples(width: int, heads: int, neurons: int) -> None:
    """One layer of BERT-base, MiniLM and BERT-large, at the budget's defaults."""
    model = make_model(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=neurons,
        num_hidden_layers=1,
    ).eval()
    batch = make_batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = plan(sensitivity(model, [batch]), Budget(flops=0.5))
    assert 0.495 <= made.flops_ratio <= 0.5
    assert made.kept_counts()["layer.0.neurons"] % 16 == 0
    apply(model, made, form="masked")
    masked = outputs(model, batch)[1]
    restore(model)
    apply(model, made)
    torch.testing.assert_close(outputs(model, batch)[1], masked, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(compact(model), batch)[1], outputs(model, batch)[1])
    restore(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
