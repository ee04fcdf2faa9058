"""LISA: which layers are drawn, that the others do not move, what the optimizer holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.methods.lisa import Lisa, drawn
from sensikernels.methods.trained import outside_layers
from tests.methods.test_trained import (
    assert_costs_as_planned,
    assert_resumes,
    exp_avg,
    make_run,
    moved,
    step,
    tensors_of,
)


def test_draws_are_uniform_and_a_function_of_seed_and_interval() -> None:
    sets = [tuple(drawn(7, number, 5, 2)) for number in range(3000)]
    assert sets == [tuple(drawn(7, number, 5, 2)) for number in range(3000)]
    assert sets != [tuple(drawn(8, number, 5, 2)) for number in range(3000)]
    counts = Counter(sets)
    assert len(counts) == 10  # every pair of five
    assert all(a < b for a, b in counts)
    # 3000 / 10 with a standard deviation of 16.
    assert all(230 < count < 370 for count in counts.values())
    assert drawn(0, 0, 3, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("bert", torch.float32), ("bert", torch.bfloat16), ("modernbert", torch.float32)],
)
def test_only_the_drawn_layers_and_what_is_no_layer_move(kind: str, dtype: torch.dtype) -> None:
    run, method = make_run(kind, dtype=dtype), Lisa(layers=2, interval=3)
    root = {"bert": "bert.encoder.layer", "modernbert": "model.layers"}[kind]
    method.begin(run)
    for number in range(9):
        before = tensors_of(run)
        step(method, run, number)
        chosen = tuple(f"{root}.{i}." for i in drawn(0, number // 3, 4, 2))
        outside = set(outside_layers(run.model))
        may = outside | {name for name in before if name.startswith(chosen)}
        assert run.plan is not None
        assert set(run.plan.trainable or ()) == may
        went = moved(run, before)
        assert went <= may
        assert len(went) > len(may) / 2
    assert len(run.events) == 3


def test_a_dropped_layer_loses_its_moments_and_one_drawn_again_keeps_them() -> None:
    draws = [set(drawn(0, number, 4, 2)) for number in range(8)]
    stays = next(i for i in range(7) if len(draws[i] & draws[i + 1]) == 1)
    run, method = make_run(max_steps=8), Lisa(layers=2, interval=1)
    run_names = "bert.encoder.layer.{}.output.dense.weight"
    for number in range(stays + 1):
        step(method, run, number)
    held = {i: exp_avg(run, run_names.format(i)) for i in range(4)}
    assert {i for i, value in held.items() if value is not None} == draws[stays]
    run.step = stays + 1
    method.begin_step(run)
    for i in range(4):
        now = exp_avg(run, run_names.format(i))
        assert now is (held[i] if i in draws[stays] & draws[stays + 1] else None)


def test_it_saves_weight_gradients_alone() -> None:
    run, method = make_run(), Lisa(layers=1)
    step(method, run, 0)
    assert_costs_as_planned(run)
    assert run.plan is not None
    assert 2 / 3 < run.plan.flops_ratio < 1


@pytest.mark.parametrize("at", [3, 4])
def test_a_killed_run_goes_on_to_the_bit(at: int, tmp_path: Path) -> None:
    assert_resumes(lambda: Lisa(layers=2, interval=4), make_run, at, tmp_path)


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="layers: expected at least 1, got 0"):
        Lisa(layers=0)
    with pytest.raises(UsageError, match="interval: expected at least 1 step, got 0"):
        Lisa(interval=0)
    run = make_run()
    with pytest.raises(UsageError, match="layers: expected at most the encoder's 4, got 5"):
        Lisa(layers=5).begin(run)
    assert run.plan is None
