"""SMT: blocks of the largest summed gradients, which alone train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.hf import compact, training_flops, use_packed
from sensikernels.methods import method
from sensikernels.methods.smt import SMT
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw
from tests.methods.part_runs import HEAD, assert_resumes, drive, family_run, make_run, values

PLACES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


def linears(*roles: str) -> list[str]:
    return [f"bert.encoder.layer.{i}.{PLACES[role]}" for i in range(2) for role in roles]


def best_blocks(sums: dict[str, Tensor], side: int, share: float) -> dict[str, Tensor]:
    """The definition: mean |sum| of every block, the best of all in one list."""
    scores = {}
    for name, total in sums.items():
        rows, columns = (size // side for size in total.shape)
        for i in range(rows):
            for j in range(columns):
                block = total[i * side : (i + 1) * side, j * side : (j + 1) * side]
                scores[name, i, j] = float(block.double().abs().mean())
    best = sorted(scores, key=lambda key: -scores[key])[: max(round(share * len(scores)), 1)]
    grids = {
        n: torch.zeros([s // side for s in t.shape], dtype=torch.bool) for n, t in sums.items()
    }
    for name, i, j in best:
        grids[name][i, j] = True
    return {name: grid for name, grid in grids.items() if grid.any()}


def gradients(model: Any, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    total = [torch.zeros_like(w) for w in weights]
    for batch in batches:
        for one, grad in zip(total, torch.autograd.grad(model(**batch).loss, weights), strict=True):
            one += grad
    return dict(zip(names, total, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("roles", [("query", "key", "value"), ("value", "intermediate", "output")])
def test_blocks_of_the_largest_gradients_are_chosen(roles: tuple[str, ...], packed: bool) -> None:
    run, dense = make_run(make_model(dropout=0.1)), make_model(dropout=0.1).eval()
    if packed:
        use_packed(run.model)
    smt = SMT(block=8, share=0.25, roles=roles)
    smt.begin(run)
    wanted = best_blocks(gradients(dense, linears(*roles), list(run.batches())), 8, 0.25)
    assert run.plan is not None
    assert run.plan.update_masks.keys() == wanted.keys()
    for name, grid in wanted.items():
        mask = run.plan.update_masks[name]
        assert mask.block_shape == (8, 8)
        assert torch.equal(mask.grid, grid)
    assert smt.state() == {}
    assert run.model.training  # as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_chosen_blocks_and_the_head_move(dtype: torch.dtype) -> None:
    run, smt = make_run(make_model().to(dtype)), SMT(block=8, share=0.25)
    before = values(run.model)
    smt.begin(run)
    drive(smt, run, 4)
    masks = run.plan.update_masks  # type: ignore[union-attr]
    assert sum(int(mask.grid.sum()) for mask in masks.values()) == round(0.25 * 6 * 16)
    for name, value in values(run.model).items():
        moved, linear = value != before[name], name.removesuffix(".weight")
        if linear in masks:
            kept = masks[linear].grid.repeat_interleave(8, 0).repeat_interleave(8, 1)
            assert not bool(moved[~kept].any())
            assert bool(moved[kept].float().mean() > 0.5)
        elif not name.startswith(("classifier", "bert.pooler")):
            assert not bool(moved.any()), name


def test_a_warm_up_trains_everything_and_its_gradients_choose() -> None:
    run, smt = make_run(), SMT(block=8, share=0.25, warmup=0.4)
    names = linears("query", "key", "value")
    smt.begin(run)
    total = {name: torch.zeros(32, 32) for name in names}
    for step in range(3):  # int(0.4 · 8)
        before = values(run.model)
        for name, grad in gradients(run.model, names, [make_batch(seed=step)]).items():
            total[name] += grad
        drive(smt, run, step + 1)
        assert not any(torch.equal(v, before[n]) for n, v in values(run.model).items())
        assert run.plan is None
    for name, value in smt.state().items():
        torch.testing.assert_close(value, total[name], rtol=1e-4, atol=1e-6)
    drive(smt, run, 4)
    wanted = best_blocks(total, 8, 0.25)
    assert run.plan is not None
    assert run.plan.update_masks.keys() == wanted.keys()
    assert all(torch.equal(run.plan.update_masks[n].grid, g) for n, g in wanted.items())
    assert smt.state() == {}
    assert run.events == [f"step 3: 24 blocks of 8 x 8 train, in {len(wanted)} linears"]
    frozen = values(run.model)
    drive(smt, run, 6)
    assert torch.equal(
        values(run.model)["bert.embeddings.word_embeddings.weight"],
        frozen["bert.embeddings.word_embeddings.weight"],
    )


@pytest.mark.parametrize(("warmup", "at"), [(0.0, 3), (0.5, 2), (0.5, 4), (0.5, 5)])
def test_a_killed_run_goes_on(warmup: float, at: int) -> None:
    def fresh() -> Any:
        return make_run(make_model(dropout=0.1))

    assert_resumes(lambda: SMT(block=8, share=0.3, warmup=warmup), fresh, at=at)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_flops_are_as_planned(share: float, packed: bool) -> None:
    run = make_run()
    if packed:
        use_packed(run.model, multiple=1)
    SMT(block=8, share=share, roles=("key", "output")).begin(run)
    batch = make_batch()
    batch["attention_mask"][:] = 1
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert run.plan is not None
    assert counted == pytest.approx(run.plan.flops_planned, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "roles"),
    [("distilbert", ("query", "value")), ("modernbert", ("query_key_value", "intermediate"))],
)
def test_other_families(kind: str, roles: tuple[str, ...]) -> None:
    run = family_run(kind)
    before = values(run.model)
    smt = SMT(share=0.2, roles=roles)
    smt.begin(run)
    drive(smt, run, 3, lambda _: draw(HEAD, kind))
    masks = run.plan.update_masks  # type: ignore[union-attr]
    plain = values(compact(run.model))
    for name, mask in masks.items():
        moved = plain[f"{name}.weight"] != before[f"{name}.weight"]
        assert bool(moved.any())
        assert not bool(moved[~mask.dense()].any())


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    run = make_run()
    with pytest.raises(UsageError, match="block: expected a divisor of 32, the largest, got 24"):
        SMT(block=24).begin(run)
    with pytest.raises(UsageError, match="roles: expected some of query, key, .* for BERT, got to"):
        SMT(roles=("to",)).begin(run)
    with pytest.raises(UsageError, match="roles: expected query, key and value together for Mod"):
        SMT(roles=("query", "key")).begin(family_run("modernbert"))
    run.batches = lambda: []
    with pytest.raises(UsageError, match="batches: expected at least one batch"):
        SMT(block=8).begin(run)
    assert run.plan is None
    assert all(p.requires_grad for p in run.model.parameters())


@pytest.mark.parametrize(
    "bad", [{"warmup": 1.0}, {"block": -1}, {"block": 8.0}, {"share": 0}, {"roles": ()}]
)
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        method("smt", **bad)
