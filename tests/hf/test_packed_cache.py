"""A frozen prefix is computed once for each sentence, and only while it may be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sensikernels.errors import UsageError
from sensikernels.hf import cache_frozen_prefix, restore_packed, use_packed
from tests.hf.packed_cases import LENGTHS, draw, make, run, same


def frozen(depth: int = 2, **named: float) -> nn.Module:
    model = make(num_hidden_layers=4, **named).double()
    for name, parameter in model.named_parameters():
        low = any(f"layer.{i}." in name for i in range(depth))
        parameter.requires_grad_(not (low or "embeddings." in name))
    use_packed(model)
    return model


def test_epochs_after_the_first_compute_nothing_below(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen()
    batches = [draw("classification", LENGTHS["every length"], seed=s) for s in range(3)]
    wanted = [run(model, batch) for batch in batches]
    calls: list[int] = []
    lowest = model.get_submodule("bert.encoder.layer.1.output.dense")
    forward = nn.Linear.forward

    def counted(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if linear is lowest:
            calls.append(len(x))
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    cache = cache_frozen_prefix(model)
    assert cache.depth == 2
    for _ in range(2):
        for batch, (out, grads) in zip(batches, wanted, strict=True):
            got, ours = run(model, batch)
            torch.testing.assert_close(got.logits, out.logits, rtol=0, atol=1e-12)
            same(ours, grads, 1e-12)
    assert len(calls) == 3
    assert (cache.hits, cache.misses) == (39, 39)
    mixed = {k: torch.cat([v[:3] for v in (batches[0][k], batches[1][k])]) for k in batches[0]}
    run(model, mixed)
    assert len(calls) == 3


def test_sentences_beyond_the_limit_are_computed_again() -> None:
    model, batch = frozen(), draw("classification", LENGTHS["every length"])
    wanted, grads = run(model, batch)
    cache = cache_frozen_prefix(model, limit_mib=10 * 32 * 8 / 2**20)  # ten tokens of 91
    for _ in range(2):
        got, ours = run(model, batch)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-12)
        same(ours, grads, 1e-12)
    assert 0 < cache.hits < 6


def test_other_weights_empty_it() -> None:
    model, batch = frozen(), draw("classification", LENGTHS["ragged"])
    cache_frozen_prefix(model)
    run(model, batch)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.weight").mul_(2.0)
    got = run(model, batch)[0].logits
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, batch)[0].logits, run(twin, batch)[0].logits)
    restore_packed(model)
    torch.testing.assert_close(got, run(model, batch)[0].logits, rtol=0, atol=1e-10)


def test_what_trains_or_drops_out_is_refused() -> None:
    batch = draw("classification", LENGTHS["ragged"])
    with pytest.raises(UsageError, match="expected packed tokens .use_packed."):
        cache_frozen_prefix(make())
    trained = make()
    use_packed(trained)
    with pytest.raises(UsageError, match="expected frozen embeddings and a frozen lowest layer"):
        cache_frozen_prefix(trained)
    model = frozen(dropout=0.1)
    cache_frozen_prefix(model)
    model.eval()(**batch)
    with pytest.raises(UsageError, match="expected no dropout in the frozen prefix, got p=0.1"):
        model.train()(**batch)
    model = frozen()
    cache_frozen_prefix(model)
    model.get_parameter("bert.encoder.layer.1.output.dense.bias").requires_grad_(True)
    with pytest.raises(UsageError, match="expected a frozen prefix, got 1 trained"):
        model(**batch)
