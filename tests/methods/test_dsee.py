"""DSEE: adapters, single entries of W, and a pruned W that stays zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.hf import training_flops, use_packed
from sensikernels.hf.adapters import deltas
from sensikernels.methods import method
from sensikernels.methods.dsee import DSEE
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw
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
ADAPTED = [
    f"bert.encoder.layer.{i}.attention.self.{r}" for i in range(2) for r in ("query", "value")
]


def dsee(**options: Any) -> DSEE:
    return DSEE(**{"rank": 4, "sparse": 10, **options})


def plain(name: str) -> str:
    return name.replace("base_layer.", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["largest", "random"])
def test_s_is_so_many_entries_of_each_weight(positions: str, dtype: torch.dtype) -> None:
    run, method_ = make_run(make_model().to(dtype)), dsee(positions=positions, pruning=0)
    before = values(run.model)
    method_.begin(run)
    drive(method_, run, 3)
    for name, value in values(run.model).items():
        if "lora_" in name or in_head(name):
            continue
        moved, linear = value != before[plain(name)], plain(name).removesuffix(".weight")
        if linear not in ADAPTED:
            assert not bool(moved.any()), name
            continue
        mask = run.plan.update_masks[f"{linear}.base_layer"].grid  # type: ignore[union-attr]
        assert int(mask.sum()) == 10
        assert not bool(moved[~mask].any())
        assert bool(moved[mask].float().mean() > 0.5)
        if positions == "largest":
            sizes = before[plain(name)].abs().float()
            assert bool(sizes[mask].min() >= sizes[~mask].max())


def test_the_forward_is_w_and_the_product_and_s() -> None:
    run, method_ = make_run(), dsee(alpha=12.0, pruning=0)
    use_packed(run.model)
    method_.begin(run)
    drive(method_, run, 3)
    reference = make_model()
    held = values(run.model)
    weights = {plain(n): v for n, v in held.items() if "lora_" not in n}
    for name in ADAPTED:
        up, down = (held[f"{name}.lora_{x}.default.weight"] for x in "BA")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 12 / 4 * up @ down
    reference.load_state_dict(weights)
    wanted = reference.eval()(**make_batch()).logits
    torch.testing.assert_close(
        run.model.eval()(**make_batch()).logits, wanted, rtol=1e-4, atol=1e-5
    )
    method_.end(run)
    for name, value in values(run.model).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(run.model(**make_batch()).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_smallest_of_all_encoder_weights_become_zero(share: float, dtype: torch.dtype) -> None:
    run, method_ = make_run(make_model().to(dtype)), dsee(pruning=share, prune_at=0.4)
    method_.begin(run)
    drive(method_, run, 3)
    before, change = values(run.model), deltas(run.model)
    trained = {n.removesuffix(".base_layer"): m.grid for n, m in masks_of(run).items()}
    sizes = {}
    for name, value in before.items():
        linear = plain(name).removesuffix(".weight")
        if ".encoder.layer." in name and value.ndim == 2 and "lora_" not in name:
            size = (value.float() + change.get(linear, 0)).abs()
            sizes[name] = size.masked_fill(trained.get(linear, torch.zeros(1).bool()), torch.inf)
    drive(method_, run, 4)  # int(0.4 · 8) steps are done: now it prunes
    after = values(run.model)
    gone = {name: (after[name] == 0) & (before[name] != 0) for name in sizes}
    total = sum(size.numel() for size in sizes.values())
    assert total == 2 * (4 * 32 * 32 + 2 * 32 * 48)
    zeros = torch.cat([(after[name] == 0).flatten() for name in sizes])
    assert int(zeros.sum()) == round(share * total)
    every = torch.cat([size.flatten() for size in sizes.values()])
    assert bool(every[zeros].max() <= every[~zeros].min())
    assert run.events[-1] == f"step 3: {round(share * total)} of {total} encoder weights pruned"
    drive(method_, run, 7)
    last = values(run.model)
    for name, mask in gone.items():
        assert not bool(last[name][mask].any()), name
        linear = plain(name).removesuffix(".weight")
        frozen = ~trained.get(linear, torch.zeros_like(mask))
        assert torch.equal(last[name][frozen], after[name][frozen])
    moved = [n for n in last if "lora_" in n and not torch.equal(last[n], after[n])]
    assert len(moved) == 8
    assert bool(
        torch.cat(
            [
                (last[n] != after[n])[trained[plain(n)[:-7]]]
                for n in gone
                if plain(n)[:-7] in trained
            ]
        )
        .float()
        .mean()
        > 0.5
    )


def masks_of(run: Any) -> Any:
    return run.plan.update_masks


@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_killed_run_goes_on(at: int) -> None:
    def fresh() -> Any:
        return make_run(make_model(dropout=0.1))

    assert_resumes(lambda: dsee(dropout=0.1, positions="random"), fresh, at=at)


@pytest.mark.parametrize("sparse", [0, 10])
def test_flops_are_as_planned(sparse: int) -> None:
    run = make_run()
    use_packed(run.model, multiple=1)
    dsee(sparse=sparse).begin(run)
    batch = make_batch()
    batch["attention_mask"][:] = 1
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert run.plan is not None
    assert counted == pytest.approx(run.plan.flops_planned, rel=1e-9)


@pytest.mark.parametrize("kind", ["distilbert", "modernbert"])
def test_other_families(kind: str) -> None:
    roles = ("query_key_value",) if kind == "modernbert" else ("query", "value")
    run, method_ = family_run(kind), dsee(roles=roles, prune_at=0.2)
    names = values(run.model).keys()
    method_.begin(run)
    drive(method_, run, 4, lambda _: draw(HEAD, kind))
    method_.end(run)
    after = values(run.model)
    assert after.keys() == names
    inner = [v for n, v in after.items() if "layer" in n and v.ndim == 2 and not in_head(n)]
    zeros = sum(int((v == 0).sum()) for v in inner) / sum(v.numel() for v in inner)
    assert 0.2 < zeros < 0.5  # W + B A is dense where adapters are


@pytest.mark.parametrize(
    "bad",
    [{"rank": 0}, {"sparse": -1}, {"positions": "best"}, {"pruning": 1.0}, {"prune_at": -0.1}],
)
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        method("dsee", **bad)


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    run = make_run()
    with pytest.raises(UsageError, match="sparse: expected at most 1024 entries, got 1025"):
        dsee(sparse=1025).begin(run)
    with pytest.raises(UsageError, match="pruning: expected at most 0.721, as S stays, got 0.8"):
        dsee(sparse=1000, pruning=0.8).begin(run)
    assert run.plan is None
    assert all(p.requires_grad for p in run.model.parameters())
