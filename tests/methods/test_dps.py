"""DPS Dense: stages, counts and what stays frozen (methods' published code, section 2 of ours)."""

from __future__ import annotations

import pytest
import torch

from sensikernels._core.bits import unpack_bits
from sensikernels._core.errors import UsageError
from sensikernels.masks import Geometry
from sensikernels.methods import DPS, Run
from sensikernels.methods.dps import kept_count, matrices, stage_length, stage_of
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model


def test_stages_of_the_published_schedules() -> None:
    steps = {"mrpc": 690, "rte": 468, "sts-b": 1080, "cola": 1605}
    lengths = {name: stage_length(n, 0.05) for name, n in steps.items()}
    assert lengths == {"mrpc": 34, "rte": 23, "sts-b": 54, "cola": 80}
    stages = [stage_of(step, 3) for step in range(1, 13)]
    assert stages == [1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2]
    assert stage_length(10, 0.05) == 1


def test_kept_counts_round_up() -> None:
    assert kept_count(10, 0.3) == 7
    assert kept_count(768 * 768, 0.3) == 412_877
    assert kept_count(5, 0.0) == 5


def drive(method: DPS, run: Run, steps: int) -> list[dict[str, torch.Tensor]]:
    """Train; returns the masked matrices before each step and after the last."""
    seen = []
    method.begin(run)
    for step in range(steps):
        run.step = step
        seen.append({n: p.detach().clone() for n, p in matrices(run.model).items()})
        run.model(**make_batch(seed=step)).loss.backward()
        method.before_step(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
    seen.append({n: p.detach().clone() for n, p in matrices(run.model).items()})
    return seen


def kept_of(method: DPS, name: str, like: torch.Tensor) -> torch.Tensor:
    return unpack_bits(method.state()[f"kept.{name}"], like.numel()).view(like.shape)


def make_run(kind: type[torch.optim.Optimizer]) -> Run:
    model = make_model()
    return Run(
        model=model,
        optimizer=kind(model.parameters(), lr=1e-2),  # type: ignore[call-arg]
        max_steps=40,
        batches=lambda: [],
        geometry=Geometry.uniform(9),
    )


def test_scope_is_linears_pooler_and_classifier() -> None:
    names = set(matrices(make_model()))
    assert len(names) == 2 * 6 + 2
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= names


def test_clean_freezes_to_the_bit() -> None:
    run, method = make_run(SubsetAdamW), DPS(masked_share=0.3, update_ratio=0.1)
    seen = drive(method, run, 8)  # stage 1: steps 0-3, stage 2: steps 4-7
    assert run.plan is not None
    for name, start in seen[4].items():
        kept = kept_of(method, name, start)
        assert int(kept.sum()) == kept_count(start.numel(), 0.3)
        assert torch.equal(kept, run.plan.update_masks[name.removesuffix(".weight")].grid)
        assert torch.equal(seen[8][name][~kept], start[~kept])
        assert not torch.equal(seen[8][name][kept], start[kept])
        assert not torch.equal(seen[1][name], seen[0][name])
    drive_on = {n: p.clone() for n, p in matrices(run.model).items()}
    run.step = 8
    run.model(**make_batch()).loss.backward()
    method.before_step(run)
    run.optimizer.step()
    assert method.state().keys() == {f"sum.{n}" for n in drive_on}
    assert all(bool((p != drive_on[n]).any()) for n, p in matrices(run.model).items())


def test_scores_are_the_stages_squared_gradients() -> None:
    run, method = make_run(SubsetAdamW), DPS(masked_share=0.5, update_ratio=0.1)
    name = "classifier.weight"
    total = torch.zeros_like(matrices(run.model)[name])
    method.begin(run)
    for step in range(5):
        run.step = step
        run.model(**make_batch(seed=step)).loss.backward()
        weight = matrices(run.model)[name]
        assert weight.grad is not None
        if step < 4:
            total += weight.grad.square()
        method.before_step(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
    order = total.flatten().argsort(descending=True, stable=True)
    kept = kept_of(method, name, total).flatten()
    assert bool(kept[order[:32]].all())
    assert not bool(kept[order[32:]].any())


def test_as_published_drifts() -> None:
    run, method = make_run(torch.optim.AdamW), DPS(update_ratio=0.1, as_published=True)
    seen = drive(method, run, 6)
    name = "bert.pooler.dense.weight"
    kept = kept_of(method, name, seen[4][name])
    assert not torch.equal(seen[5][name][~kept], seen[4][name][~kept])


def test_clean_needs_the_subset_optimizer() -> None:
    with pytest.raises(UsageError, match="expected SubsetAdamW for dps without as_published"):
        DPS().begin(make_run(torch.optim.AdamW))


@pytest.mark.parametrize("bad", [{"masked_share": 1.0}, {"update_ratio": 0.0}])
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        DPS(**bad)  # type: ignore[arg-type]
