"""LoRA through PEFT: what trains, what it computes, and the plain model that is left."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.hf import applied, training_flops, use_packed
from sensikernels.hf.adapters import deltas, inject_lora, merge_lora
from sensikernels.methods import method
from sensikernels.methods.lora import LoRA
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make
from tests.methods.part_runs import (
    HEAD,
    assert_resumes,
    drive,
    family_run,
    in_head,
    make_run,
    values,
)

pytest.importorskip("peft")


def begun(model: nn.Module | None = None, **options: Any) -> tuple[Any, LoRA]:
    run, lora = make_run(model), LoRA(**{"dropout": 0.0, **options})
    lora.begin(run)
    return run, lora


def factors(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every adapter, by the linear's name."""
    held = dict(model.named_parameters())
    return {
        n.removesuffix(".lora_A.default.weight"): (
            p.detach(),
            held[n.replace("lora_A", "lora_B")].detach(),
        )
        for n, p in held.items()
        if n.endswith("lora_A.default.weight")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_and_the_head_train(dtype: torch.dtype) -> None:
    before = values(make_model().to(dtype))
    run, lora = begun(make_model().to(dtype), rank=4)
    pairs = factors(run.model)
    assert set(pairs) == {
        f"bert.encoder.layer.{i}.attention.self.{role}"
        for i in range(2)
        for role in ("query", "value")
    }
    for down, up in pairs.values():
        assert (down.shape, up.shape) == ((4, 32), (32, 4))
        assert down.dtype == up.dtype == dtype
        assert bool(down.any())
        assert not bool(up.any())
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    trains = [p for p in run.model.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trains}
    places = {id(p): i for i, p in enumerate(run.model.parameters())}
    for group in run.optimizer.param_groups:
        order = [places[id(p)] for p in group["params"]]
        assert order == sorted(order)
        decays = {p.ndim == 2 for p in group["params"]}
        assert decays == {group["weight_decay"] > 0}
    drive(lora, run, 3)
    for name, value in values(run.model).items():
        plain = name.replace("base_layer.", "")
        if "lora_" in name:
            assert bool(value.any())
        elif not in_head(name):
            assert torch.equal(value, before[plain]), name


def test_adapters_add_a_scaled_product_in_both_forms_of_the_step() -> None:
    padded, lora = begun(rank=4, alpha=12.0)
    drive(lora, padded, 2)
    packed, other = make_run(use_packed_model()), LoRA(rank=4, alpha=12.0, dropout=0.0)
    other.begin(packed)
    packed.model.load_state_dict(padded.model.state_dict())
    reference = make_model()
    merged = {n.replace("base_layer.", ""): v for n, v in values(padded.model).items()}
    for name, (down, up) in factors(padded.model).items():
        merged[f"{name}.weight"] += 12.0 / 4 * up @ down
        assert torch.equal(deltas(padded.model)[name], (up @ down) * 3.0)
    reference.load_state_dict({n: v for n, v in merged.items() if "lora_" not in n})
    batch = make_batch(seed=7)
    wanted = reference(**batch)
    grads = torch.autograd.grad(wanted.loss, list(reference.classifier.parameters()))
    for run in (padded, packed):
        got = run.model(**batch)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        own = torch.autograd.grad(got.loss, list(run.model.classifier.parameters()))  # type: ignore[arg-type, union-attr]
        for one, two in zip(own, grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    name = "bert.encoder.layer.0.attention.self.value"
    up = packed.model.get_parameter(f"{name}.lora_B.default.weight")
    whole = torch.autograd.grad(reference(**batch).loss, reference.get_parameter(f"{name}.weight"))
    mine = torch.autograd.grad(packed.model(**batch).loss, up)
    down = factors(padded.model)[name][0]
    torch.testing.assert_close(mine[0], 3.0 * whole[0] @ down.T, rtol=1e-4, atol=1e-5)


def use_packed_model() -> nn.Module:
    model = make_model()
    use_packed(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_is_a_plain_model(dtype: torch.dtype) -> None:
    run, lora = begun(make_model().to(dtype), rank=4)
    fresh = make_model()
    drive(lora, run, 3)
    trained, change = values(run.model), deltas(run.model)
    logits = run.model.eval()(**make_batch()).logits
    lora.end(run)
    assert applied(run.model) is None
    after = values(run.model)
    assert after.keys() == fresh.state_dict().keys()
    for name, value in after.items():
        linear = name.removesuffix(".weight")
        if linear in change:
            whole = trained[f"{linear}.base_layer.weight"].float() + change[linear]
            assert torch.equal(value, whole.to(dtype))
        else:
            assert torch.equal(value, trained.get(name, trained.get(adapted(name)))), name
    kinds = {n: type(m) for n, m in fresh.named_modules()}
    assert {n: type(m) for n, m in run.model.named_modules()} == kinds
    assert vars(run.model).keys() == vars(fresh).keys()
    close = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(run.model(**make_batch()).logits, logits, rtol=close, atol=close)


def adapted(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.base_layer.{leaf}"


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_run_goes_on(at: int) -> None:
    def fresh() -> Any:
        return make_run(make_model(dropout=0.1), seed=3)

    assert_resumes(lambda: LoRA(rank=4, dropout=0.1), fresh, at=at)


def test_adapters_follow_the_seed_and_draw_nothing_else() -> None:
    def downs(seed: int, before: int) -> list[torch.Tensor]:
        run = make_run(seed=seed)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        LoRA().begin(run)
        assert torch.equal(torch.get_rng_state(), state)
        return [down for down, _ in factors(run.model).values()]

    one, same, other = downs(1, 5), downs(1, 6), downs(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("roles", [("query", "value"), ("attention_output", "output")])
def test_flops_are_as_planned(roles: tuple[str, ...], packed: bool) -> None:
    model = make_model()
    if packed:
        use_packed(model, multiple=1)
    run, _ = begun(model, rank=4, roles=roles)
    batch = make_batch()
    batch["attention_mask"][:] = 1
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert counted == pytest.approx(run.plan.flops_planned, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "roles"),
    [("roberta", ("query", "value")), ("distilbert", ("output",)), ("mpnet", ("key",))]
    + [("modernbert", ("query_key_value", "output")), ("deberta-v2", ("query", "position_key"))],
)
def test_other_families(kind: str, roles: tuple[str, ...]) -> None:
    run, lora = family_run(kind), LoRA(rank=2, dropout=0.0, roles=roles)
    before = values(run.model)
    lora.begin(run)
    drive(lora, run, 3, lambda _: draw(HEAD, kind))
    lora.end(run)
    moved = {n for n, v in values(run.model).items() if not torch.equal(v, before[n])}
    paths = tuple(f"{make_family(kind).linears[role]}.weight" for role in roles)
    assert {n for n in before if n.endswith(paths)} == {n for n in moved if not in_head(n)}


def make_family(kind: str) -> Any:
    from sensikernels.hf import family_of

    return family_of(make(kind, HEAD))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError,
        match="roles: expected query, key and value together for Mod.*, got query, va",
    ):
        LoRA().begin(family_run("modernbert"))
    run, _ = begun()
    with pytest.raises(UsageError, match="model: expected no adapters, got some"):
        inject_lora(run.model, ["classifier"], rank=1, alpha=1, dropout=0, seed=0)
    model: Any = make_model()
    inject_lora(model, ["classifier"], rank=1, alpha=1, dropout=0, seed=0)
    model.classifier.base_layer.weight.data[0, 0] = torch.nan
    with pytest.raises(UsageError, match="module classifier: expected finite weights, got others"):
        merge_lora(model)
    assert list(deltas(model)) == ["classifier"]
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("sensikernels.hf.adapters.find_spec", lambda name: None)
    with pytest.raises(SensiError, match="adapters: expected PEFT installed, .*pip install peft"):
        LoRA().begin(make_run())


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": "8"}, {"alpha": 0}, {"dropout": 1.0}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        method("lora", **bad)
