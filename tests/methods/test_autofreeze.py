"""AutoFreeze: sums, changes and the cut against plain torch, and what a kept prefix changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import encoder_layers
from sensikernels.methods import Run
from sensikernels.methods.autofreeze import AutoFreeze, interval_length, new_start
from sensikernels.world import World
from tests.methods.test_trained import (
    assert_costs_as_planned,
    assert_resumes,
    draw,
    make_run,
    moved,
    step,
    tensors_of,
)

NORM = st.floats(0.125, 8)


def test_intervals() -> None:
    assert [interval_length(n, 10) for n in (100, 25, 10, 3)] == [10, 3, 1, 1]


@given(
    pairs=st.lists(st.tuples(NORM, NORM), min_size=1, max_size=7),
    start=st.integers(0, 6),
    percentile=st.floats(0, 100),
)
def test_the_cut_is_the_first_layer_at_the_percentile(
    pairs: list[tuple[float, float]], start: int, percentile: float
) -> None:
    start = min(start, len(pairs) - 1)
    before, now = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    got = new_start(before, now, start, percentile)
    change = np.abs(before.numpy() - now.numpy()) / before.numpy()
    threshold = np.percentile(change[start:], percentile)
    near = 1e-12 * max(threshold, 1)
    assert start <= got < len(pairs)
    assert change[got] >= threshold - near
    assert all(change[start:got] < threshold + near)


def test_cuts_by_hand() -> None:
    before = torch.tensor([4.0, 4, 4, 4], dtype=torch.float64)
    now = torch.tensor([3.9, 3.8, 2, 1], dtype=torch.float64)
    assert new_start(before, now, 0, 50) == 2
    assert new_start(before, now, 2, 50) == 3
    assert new_start(before, now, 3, 50) == 3
    assert new_start(before, now, 0, 0) == 0
    assert new_start(torch.zeros_like(before), torch.zeros_like(before), 1, 50) == 1


def reference(run: Run, length: int, percentile: float) -> list[tuple[int, int]]:
    """(step, lowest layer that trains) of every cut, by plain sums of gradients."""
    cuts, sums, previous, start = [], {}, None, 0
    layers = [f"bert.encoder.layer.{i}." for i in range(4)]
    for number in range(run.max_steps):
        if number and number % length == 0:
            norms = [
                sum(float(v.abs().sum()) for n, v in sums.items() if n.startswith(layer))
                for layer in layers
            ]
            if previous is not None:
                ratios = [
                    abs(p - c) / p for p, c in zip(previous[start:], norms[start:], strict=True)
                ]
                limit = np.percentile(ratios, percentile)
                new = start + next(i for i, r in enumerate(ratios) if r >= limit)
                if new > start:
                    cuts.append((number, new))
                start = new
            previous, sums = norms, {}
        low = ("bert.embeddings.", *layers[:start])
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(start == 0 or not name.startswith(low))
        run.model(**draw(number)).loss.backward()
        for name, parameter in run.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.is_sparse:
                sums[name] = sums.get(name, 0) + parameter.grad.double()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    return cuts


def started(**named: Any) -> Callable[[], Run]:
    return lambda: make_run(max_steps=16, **named)


def test_a_run_cuts_where_plain_sums_say() -> None:
    run, method = started()(), AutoFreeze(intervals=8, percentile=60)
    method.begin(run)
    for number in range(16):
        step(method, run, number)
    want = reference(started()(), 2, 60)
    assert len(want) > 1
    said = [f"step {at}: embeddings and {start} layers frozen" for at, start in want]
    assert run.events == said
    assert run.plan is not None
    assert run.plan.origin["start"] == want[-1][1]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bert", torch.bfloat16), ("distilbert", torch.float32)]
)
def test_what_is_frozen_does_not_move(kind: str, dtype: torch.dtype) -> None:
    run, method = started(kind=kind, dtype=dtype)(), AutoFreeze(intervals=8)
    method.begin(run)
    frozen: set[str] = set()
    for number in range(16):
        before = tensors_of(run)
        step(method, run, number)
        assert run.plan is not None
        now = set(before) - set(run.plan.trainable or ())
        assert frozen <= now
        assert moved(run, before) <= set(run.plan.trainable or ())
        frozen = now
    layers = encoder_layers(run.model)
    start = run.plan.origin["start"]
    low = (f"{kind}.embeddings.", *(f"{layer.prefix}." for layer in layers[:start]))
    assert start > 0
    assert frozen == {name for name in before if name.startswith(low)}
    assert all(value.dtype == torch.float32 for value in method.state().values() if value.ndim > 1)
    assert_costs_as_planned(run)


@pytest.mark.parametrize(("at", "cache"), [(5, False), (6, True), (13, True)])
def test_a_killed_run_goes_on_to_the_bit(at: int, cache: bool, tmp_path: Path) -> None:
    whole = assert_resumes(lambda: AutoFreeze(intervals=8, cache=cache), started(), at, tmp_path)
    assert len(whole.events) > 1


def test_a_kept_prefix_changes_nothing_but_dropout_and_grows() -> None:
    plain, kept = started()(), started()()
    depths, last = [], None
    for run, cache in ((plain, False), (kept, True)):
        method = AutoFreeze(intervals=8, cache=cache)
        method.begin(run)
        for number in range(16):
            step(method, run, number)
            found: Any = getattr(run.model.bert, "prefix_cache", None)
            if found is not None and found is not last:
                depths.append(found.depth)
                last = found
    assert plain.events == kept.events
    for name, value in tensors_of(plain).items():
        torch.testing.assert_close(dict(kept.model.named_parameters())[name], value)
    starts = [int(event.split()[4]) for event in kept.events]
    assert depths == starts
    dropping = make_run(max_steps=16, dropout=0.2)
    method = AutoFreeze(intervals=8, cache=True)
    method.begin(dropping)
    for number in range(16):
        step(method, dropping, number)
    assert dropping.plan is not None
    low = tuple(f"bert.encoder.layer.{i}." for i in range(dropping.plan.origin["start"]))
    assert low
    for name, module in dropping.model.named_modules():
        if isinstance(module, nn.Dropout):
            off = name.startswith(("bert.embeddings.", *low))
            assert module.p == (0.0 if off else 0.2), name


def test_refusals() -> None:
    with pytest.raises(UsageError, match="intervals: expected at least 1, got 0"):
        AutoFreeze(intervals=0)
    with pytest.raises(UsageError, match="percentile: expected a number from 0 to 100, got 101"):
        AutoFreeze(percentile=101)
    padded, two = make_run(packed=False), make_run()
    two.world = World(size=2)
    with pytest.raises(UsageError, match="cache: expected packed tokens, got padded ones"):
        AutoFreeze(cache=True).begin(padded)
    with pytest.raises(UsageError, match="cache: expected one process, got 2"):
        AutoFreeze(cache=True).begin(two)
    for run in (padded, two):
        assert run.plan is None
        assert all(p.requires_grad for p in run.model.parameters())


def test_modernbert_keeps_its_prefix() -> None:
    run, method = started(kind="modernbert")(), AutoFreeze(intervals=8, cache=True)
    method.begin(run)
    for number in range(16):
        step(method, run, number)
    cache: Any = run.model.model.prefix_cache
    assert run.plan is not None
    assert cache.depth == run.plan.origin["start"] > 0
    assert cache.misses > 0


def test_sums_are_of_the_layers_alone() -> None:
    run, method = make_run(), AutoFreeze()
    method.begin(run)
    step(method, run, 0)
    sums: dict[str, Tensor] = method.state()
    layers = {n for n, _ in run.model.named_parameters() if n.startswith("bert.encoder.layer.")}
    assert set(sums) == {f"sum.{name}" for name in layers}
