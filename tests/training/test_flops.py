"""Settings, options, FLOPs, memory and the learning rate: each part on its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels._core.shapes import MULTIPLE
from sensikernels.hf import load_model, structure_of, training_flops, use_packed
from sensikernels.training import rank
from sensikernels.training.config import parse_counts, parse_options
from sensikernels.training.data import Data
from sensikernels.training.flops import flops_per_token
from sensikernels.training.loop import prepare
from sensikernels.training.memory import MIB, activation_mib, peak_mib, resident_bytes
from sensikernels.training.runner import groups
from sensikernels.training.schedule import schedule
from sensikernels.training.session import fresh_model


def test_options_take_the_type_of_their_default():
    assert parse_options("sensi-bert", ["warmup=0.2", "multiples=heads:2,neurons:8"]) == {
        "warmup": 0.2,
        "multiples": {"heads": 2, "neurons": 8},
    }
    assert parse_options("bitfit", ["subsets=query, value"]) == {"subsets": ("query", "value")}
    assert parse_options("dps", ["as-published=true", "masked_share=0.5"]) == {
        "as_published": True,
        "masked_share": 0.5,
    }
    with pytest.raises(UsageError, match="as_published: expected true or false"):
        parse_options("dps", ["as_published=yes"])
    assert parse_counts("heads=3, neurons=16") == {"heads": 3, "neurons": 16}


def test_schedules():
    assert [schedule("linear", i, 4) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert schedule("constant", 3, 4) == 1.0


def test_biases_and_norms_do_not_decay(tiny):
    model = load_model(tiny, labels=2)
    decayed, plain = groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    count = len(decayed["params"]) + len(plain["params"])
    assert count == len(list(model.parameters()))
    assert all(p.ndim == 1 for p in plain["params"])
    assert all(p.ndim == 2 for p in decayed["params"])


@pytest.mark.parametrize("packed", [True, False])
def test_flops_are_the_sum_over_all_batches(settings, packed):
    asked = settings(
        max_train_samples=40, batch_size=16, epochs=2, pad_to_multiple=4, packed=packed
    )
    data = Data.load(asked, torch.device("cpu"))
    model = fresh_model(asked, data)
    if packed:
        use_packed(model)
    total = tokens = 0
    for epoch in range(2):
        for batch in data.epoch(epoch):
            total += training_flops(model, batch)
            tokens += batch["input_ids"].numel()
    assert tokens == data.geometry.tokens
    assert flops_per_token(model, data) == pytest.approx(total / tokens, rel=1e-12)
    geometry = data.geometry
    for granularity in ("heads", "dimensions"):
        structure = structure_of(model, granularity).at(geometry)
        assert structure.flops(geometry.mean_length) == pytest.approx(total / tokens, rel=1e-12)


def test_packed_batches_hold_the_rows_of_padded_ones(settings):
    asked = settings(max_train_samples=40, batch_size=16)
    data = Data.load(asked, torch.device("cpu"))
    plain = Data.load(replace(asked, packed=False), torch.device("cpu"))
    for packed, padded in zip(data.epoch(1), plain.epoch(1), strict=True):
        back = data.padded(packed)
        assert set(back) == set(padded)
        assert all(torch.equal(back[name], value) for name, value in padded.items())
    assert data.padded(padded) is padded
    assert data.geometry.real_tokens == plain.geometry.real_tokens
    assert data.geometry.rows == plain.geometry.rows
    assert data.geometry.tokens % MULTIPLE == 0


def test_torchs_dropout_is_for_padded_tokens(settings):
    with pytest.raises(UsageError, match="dropout: expected counter on packed tokens, got torch"):
        settings(dropout="torch")


def test_fresh_models_are_equal_and_leave_the_random_state(settings):
    asked = settings()
    data = Data.load(asked, torch.device("cpu"))
    before = torch.get_rng_state()
    one, other = fresh_model(asked, data), fresh_model(asked, data)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


class Wide(torch.nn.Module):
    """1 MiB of weights whose step holds 4 MiB of activation and as much of its gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1024, 256))

    def forward(self, x):
        wide = x @ self.weight.t()
        return type("Out", (), {"loss": (wide * wide).sum()})


def test_peak_memory_is_what_is_held_and_allocated():
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {"x": torch.ones(1024, 256)}
    assert resident_bytes(model, optimizer) == MIB
    peak = peak_mib(model, optimizer, batch)
    # Weight 1, wide 4 and its square 4; then up to three gradients of 4, and the weight of 1.
    assert 9 <= peak <= 20
    # Without backward: wide, its square, the loss; and a row of ones for the mean at most.
    assert activation_mib(model, batch) == pytest.approx(8, abs=0.1)
    assert model.weight.grad is None
    model(**batch).loss.backward()
    optimizer.step()
    assert resident_bytes(model, optimizer) == 3 * MIB + 4
    assert peak_mib(model, optimizer, batch) == pytest.approx(peak + 2, abs=0.01)


def test_rank_trims_without_training(settings):
    scores, plan, runner = rank(settings())
    assert scores.rows == 64
    assert plan.flops_ratio <= 0.6
    assert runner.run.step == 0


def test_the_same_seed_ranks_the_same_rows(settings):
    one, other = prepare(settings()), prepare(settings())
    pairs = zip(one.data.ranked(), one.data.ranked(), other.data.ranked(), strict=True)
    for first, second, third in pairs:
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["input_ids"], third["input_ids"])
