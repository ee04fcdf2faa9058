"""Growth: what trains at first, what joins, how much in the end; salience in plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.methods.grow import Grow, encoder_weights, joining, moments
from tests.methods.test_trained import (
    assert_costs_as_planned,
    assert_resumes,
    draw,
    make_run,
    moved,
    step,
    tensors_of,
)


def test_moments_cut_the_run_into_equal_parts() -> None:
    assert moments(100, 4) == [20, 40, 60, 80]
    assert moments(12, 2) == [4, 8]
    assert moments(3, 4) == [0, 1, 1, 2]


UNIT = st.tuples(st.floats(0, 4), st.integers(1, 9), st.booleans())


@given(units=st.lists(UNIT, min_size=1, max_size=9), room=st.floats(0, 60))
def test_the_most_salient_that_fit_join(units: list[tuple[float, int, bool]], room: float) -> None:
    names = [f"w{i}" for i in range(len(units))]
    salience, sizes, flags = (
        dict(zip(names, column, strict=True)) for column in zip(*units, strict=True)
    )
    trained = [name for name in names if flags[name]]
    chosen = joining(salience, sizes, trained, room)
    assert not set(chosen) & set(trained)
    spent = sum(sizes[name] for name in (*trained, *chosen))
    assert spent <= max(room, sum(sizes[name] for name in trained))
    for name in set(names).difference(trained, chosen):
        better = [n for n in chosen if salience[n] >= salience[name]]
        assert sum(sizes[n] for n in (*trained, *better)) + sizes[name] > room


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bert", torch.bfloat16), ("distilbert", torch.float32)]
)
def test_it_grows_to_the_share_and_never_freezes(kind: str, dtype: torch.dtype) -> None:
    run, method = make_run(kind, dtype=dtype), Grow(stages=3, share=0.4)
    method.begin(run)
    weights = encoder_weights(run.model)
    assert len(weights) == 4 * 6
    total = sum(weight.numel() for weight in weights.values())
    trained: set[str] = set()
    shares = []
    for number in range(12):
        before = tensors_of(run)
        step(method, run, number)
        assert run.plan is not None
        now = set(run.plan.trainable or ())
        assert trained <= now
        assert moved(run, before) <= now
        trained = now
        shares.append(sum(weights[n].numel() for n in now if n in weights) / total)
        if number % 3 == 0:
            assert_costs_as_planned(run)
    for stage in range(4):
        part = shares[3 * stage : 3 * stage + 3]
        assert len(set(part)) == 1
        assert part[0] <= 0.4 * stage / 3
    left = [weight.numel() / total for name, weight in weights.items() if name not in trained]
    assert shares[-1] + min(left) > 0.4
    others = {n for n in trained if n not in weights}
    assert others == {n for n in before if "norm" in n.lower() or n.endswith("bias")} | {
        n for n in before if n.startswith(("classifier.", "pre_classifier."))
    }
    assert [event.partition(":")[0] for event in run.events] == [f"step {i}" for i in (0, 3, 6, 9)]


def test_who_joins_has_the_highest_salience_per_entry() -> None:
    run, method = make_run(dropout=0.3), Grow(stages=1, share=0.25)
    method.begin(run)
    for number in range(6):
        step(method, run, number)
    model = copy.deepcopy(run.model).eval().requires_grad_(True)
    weights = encoder_weights(model)
    sums = dict.fromkeys(weights, 0.0)
    for batch in (draw(100), draw(101)):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            sums[name] += float((weight.detach() * weight.grad).abs().sum()) / weight.numel()
    room = 0.25 * sum(weight.numel() for weight in weights.values())
    want = []
    for name in sorted(sums, key=lambda n: sums[n], reverse=True):
        if weights[name].numel() <= room:
            want.append(name)
            room -= weights[name].numel()
    run.step = 6
    method.begin_step(run)
    assert run.plan is not None
    assert set(run.plan.trainable or ()) & set(weights) == set(want)


def test_the_head_alone_at_first_needs_no_backward_through_the_encoder() -> None:
    run, method = make_run(), Grow(start="head")
    method.begin(run)
    assert run.plan is not None
    assert run.plan.trainable == ("classifier.weight", "classifier.bias")
    assert run.plan.flops_ratio < 0.35
    assert_costs_as_planned(run)


@pytest.mark.parametrize("at", [4, 9])
def test_a_killed_run_goes_on_to_the_bit(at: int, tmp_path: Path) -> None:
    assert_resumes(lambda: Grow(stages=2), make_run, at, tmp_path)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="start: expected one of biases, head, got 'all'"):
        Grow(start="all")
    with pytest.raises(UsageError, match="stages: expected at least 1, got 0"):
        Grow(stages=0)
    with pytest.raises(UsageError, match=r"share: expected a share in \(0, 1\], got 0"):
        Grow(share=0)
    run = make_run()
    with pytest.raises(UsageError, match=r"share: expected at least 0\.0\d+, that of one weight"):
        Grow(share=0.001).begin(run)
    assert run.plan is None
    run.batches = lambda: iter(())
    method = Grow(stages=1)
    method.begin(run)
    run.step = 6
    with pytest.raises(UsageError, match="batches: expected some that give"):
        method.begin_step(run)
