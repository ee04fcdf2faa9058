"""A frozen prefix is computed once for each sentence, and only while it may be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from sensikernels._core.errors import UsageError
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
    config = ModernBertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        attention_dropout=0.1,
        pad_token_id=0,
    )
    other = ModernBertForSequenceClassification(config)
    use_packed(other)
    for module in (other.model.embeddings, other.model.layers[0]):
        module.requires_grad_(False)
    cache_frozen_prefix(other)
    with pytest.raises(UsageError, match="expected no dropout in the frozen prefix, got p=0.1"):
        other.train()(**batch)
    model = frozen()
    cache_frozen_prefix(model)
    model.get_parameter("bert.encoder.layer.1.output.dense.bias").requires_grad_(True)
    with pytest.raises(UsageError, match="expected a frozen prefix, got 1 trained"):
        model(**batch)


def swapped(model: nn.Module) -> None:
    """Weights copied as EMA's ``copy_to`` does."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.01)


def one_entry(model: nn.Module) -> None:
    model.get_parameter("bert.encoder.layer.1.output.dense.weight").data[3, 5] += 0.5


def negated(model: nn.Module) -> None:
    model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").data.neg_()


def permuted(model: nn.Module) -> None:
    weight = model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")
    weight.data.copy_(weight.data.flip(1))


def norm(model: nn.Module) -> None:
    model.get_parameter("bert.embeddings.LayerNorm.bias").data.add_(1e-3)


def one_word(model: nn.Module) -> None:
    word = draw("classification", LENGTHS["ragged"])["input_ids"][0, 1]
    model.get_parameter("bert.embeddings.word_embeddings.weight").data[word, 3] += 0.5


def other_words(model: nn.Module) -> None:
    table = copy.deepcopy(model.get_submodule("bert.embeddings.word_embeddings"))
    table.weight.data.mul_(1.5)  # type: ignore[operator, union-attr]
    model.bert.set_input_embeddings(table)  # type: ignore[operator, union-attr]


def replaced(model: nn.Module) -> None:
    layer = model.get_submodule("bert.encoder.layer.0")
    layer.output.dense = copy.deepcopy(model.get_submodule("bert.encoder.layer.1.output.dense"))


def other_dtype(model: nn.Module) -> None:
    model.float()


def assigned(model: nn.Module) -> None:
    state = {k: v.detach() * 1.5 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for name, parameter in model.named_parameters():
        low = any(f"layer.{i}." in name for i in range(2))
        parameter.requires_grad_(not (low or "embeddings." in name))


CHANGES = [
    swapped,
    one_entry,
    negated,
    permuted,
    norm,
    one_word,
    other_words,
    replaced,
    other_dtype,
    assigned,
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_write_is_missed(change: Callable[[nn.Module], None]) -> None:
    model, batch = frozen(), draw("classification", LENGTHS["ragged"])
    cache_frozen_prefix(model)
    before = run(model, batch)[0].logits
    change(model)
    got = run(model, batch)[0].logits
    restore_packed(model)
    use_packed(model)
    wanted = run(model, batch)[0].logits
    close = 1e-12 if got.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got, wanted, rtol=0, atol=close)
    assert got.dtype != before.dtype or float((got - before).abs().max()) > 10 * close


def test_a_word_that_changes_is_noticed_where_it_occurs() -> None:
    """Whatever other sentences were taken between; one without it stays kept."""
    model, first = frozen().eval(), draw("classification", LENGTHS["ragged"])
    second = {**first, "input_ids": first["input_ids"].clamp(max=7)}
    cache = cache_frozen_prefix(model)
    word = int(first["input_ids"].max())
    assert word > 7
    for batch in (first, second):
        model(**batch)
    kept = len(cache._kept)
    model.get_parameter("bert.embeddings.word_embeddings.weight").data[word] *= 1.5
    cache.hits = 0
    model(**second)
    assert cache.hits > 0
    assert len(cache._kept) == kept
    got = model(**first).logits
    restore_packed(model)
    use_packed(model)
    torch.testing.assert_close(got, model(**first).logits, rtol=0, atol=1e-12)


def test_modes_are_kept_apart() -> None:
    model, batch = frozen().float(), draw("classification", LENGTHS["ragged"])
    twin = copy.deepcopy(model)
    cache = cache_frozen_prefix(model)
    with torch.inference_mode():
        model(**batch)
    run(model, batch)  # inference tensors could not be trained on
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**batch).logits
        assert torch.equal(got, twin(**batch).logits)
    assert torch.equal(run(model, batch)[0].logits, run(twin, batch)[0].logits)
    assert cache.hits == 0


def test_copies_and_pickles_are_empty() -> None:
    model, batch = frozen(), draw("classification", LENGTHS["ragged"])
    cache = cache_frozen_prefix(model)
    run(model, batch)
    assert cache.held > 0
    back = pickle.loads(pickle.dumps(model))
    assert back.bert.prefix_cache.held == 0
    assert back.bert.prefix_cache.depth == cache.depth
    assert copy.deepcopy(model).bert.prefix_cache is None
    assert torch.equal(run(back, batch)[0].logits, run(model, batch)[0].logits)


def test_hooks_in_the_prefix_are_refused() -> None:
    model, batch = frozen(), draw("classification", LENGTHS["ragged"])
    cache_frozen_prefix(model)
    model.get_submodule("bert.encoder.layer.0.output.dense").register_forward_hook(
        lambda m, i, o: None
    )
    with pytest.raises(UsageError, match="expected no hooks in the kept prefix, got"):
        model(**batch)
