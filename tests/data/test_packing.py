"""Packed batches: every token in its place, every row once an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.data import (
    Batches,
    DataCollatorPacked,
    TokenBudgetSampler,
    collate_packed,
    encode,
    geometry,
)
from sensikernels.data.packing import LENGTHS
from sensikernels.masks import Geometry
from tests.data.test_batching import Words, examples


@pytest.fixture(params=[False, True], ids=["one sentence", "pairs"])
def encoded(request):
    return encode(examples(203, pair=request.param), Words())


def rows_of(batch: dict[str, Any], name: str) -> list[list[int]]:
    cu = batch["cu_seqlens"].tolist()
    flat = batch[name][0].tolist()
    return [flat[a:b] for a, b in zip(cu[:-1], cu[1:], strict=True)]


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_rows_lie_end_to_end(encoded, multiple):
    rows = [encoded[i] for i in (0, 11, 5)]
    batch = collate_packed(rows, pad_token_id=7, multiple=multiple)
    real = sum(len(row.input_ids) for row in rows)
    tokens = batch["input_ids"].shape[1]
    assert tokens == -(-real // multiple) * multiple
    assert "position_ids" not in batch
    for name in ("input_ids", "token_type_ids"):
        assert batch[name].shape == (1, tokens)
        assert batch[name].dtype == torch.int64
    assert batch["cu_seqlens"].dtype == torch.int32
    assert type(batch["max_length"]) is int
    longest = max(len(row.input_ids) for row in rows)
    assert longest <= batch["max_length"] < longest + LENGTHS
    assert batch["max_length"] % LENGTHS == 0
    assert rows_of(batch, "input_ids") == [row.input_ids.tolist() for row in rows]
    assert rows_of(batch, "token_type_ids") == [row.token_type_ids.tolist() for row in rows]
    assert batch["input_ids"][0, real:].tolist() == [7] * (tokens - real)
    assert batch["labels"].tolist() == [0, 1, 1]


def test_scores_and_absent_types():
    data = encode(examples(4, dtype=np.float32), Words(types=False))
    batch = collate_packed([data[i] for i in range(4)], pad_token_id=7)
    assert batch["labels"].dtype == torch.float32
    assert "token_type_ids" not in batch


def feature(row, label, **extra) -> dict[str, Any]:
    return {
        "input_ids": row.input_ids.tolist(),
        "token_type_ids": row.token_type_ids.tolist(),
        "attention_mask": [1] * len(row.input_ids),
        "label": label,
        **extra,
    }


def test_the_trainers_collator_agrees(encoded):
    rows = [encoded[i] for i in (4, 9, 2, 30)]
    wanted = collate_packed(rows, pad_token_id=7, multiple=16)
    collator = DataCollatorPacked(pad_token_id=7, multiple=16)
    got = collator([feature(row, int(row.label)) for row in rows])
    assert list(got)[0] == "labels"
    assert set(got) == set(wanted)
    assert got["max_length"] == max(len(row.input_ids) for row in rows)
    wanted["max_length"] = got["max_length"]
    for name, value in wanted.items():
        same = got[name] == value
        assert bool(torch.as_tensor(same).all()), name
    padded = [
        {k: v + [0] * 5 if isinstance(v, list) else v for k, v in feature(r, int(r.label)).items()}
        for r in rows
    ]
    for name, value in collator(padded).items():
        assert bool(torch.as_tensor(value == wanted[name]).all()), name


def test_the_trainers_collator_takes_labels_of_any_kind(encoded):
    rows = [encoded[i] for i in (4, 9)]
    spans = [
        {"input_ids": r.input_ids, "start_positions": i, "end_positions": i + 1}
        for i, r in enumerate(rows)
    ]
    got = DataCollatorPacked()(spans)
    assert got["start_positions"].tolist() == [0, 1]
    assert got["end_positions"].tolist() == [1, 2]
    words = [{"input_ids": r.input_ids, "labels": r.input_ids.tolist()} for r in rows]
    got = DataCollatorPacked()(words)
    real = int(got["cu_seqlens"][-1])
    assert torch.equal(got["labels"][0, :real], got["input_ids"][0, :real])
    assert (got["labels"][0, real:] == -100).all()
    with pytest.raises(UsageError, match="features: expected tokens.*got 'boxes'"):
        DataCollatorPacked()([{"input_ids": [1, 2], "boxes": [1, 2]}])


budgets = given(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),
    st.integers(60, 400),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)


@budgets
def test_a_budget_of_tokens_is_kept_and_every_row_occurs_once(lengths, tokens, bucket, seed, epoch):
    sampler = TokenBudgetSampler(lengths, tokens, seed=seed, epoch=epoch, bucket=bucket)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    assert 0 < min(sums) <= max(sums) <= tokens
    # Only the last of each window may stay below what one more row would need.
    assert len(batches) <= 2 * sum(lengths) // tokens + 1 or max(lengths) * 2 > tokens


@budgets
def test_it_resumes_anywhere(lengths, tokens, bucket, seed, epoch):
    order = {"seed": seed, "bucket": bucket}
    whole = list(TokenBudgetSampler(lengths, tokens, epoch=epoch, **order))
    for start in {0, len(whole) // 2, len(whole)}:
        rest = TokenBudgetSampler(lengths, tokens, epoch=epoch, start=start, **order)
        assert list(rest) == whole[start:]
        assert len(rest) == len(whole) - start
        rest.set_epoch(epoch + 1)
        assert list(rest) == list(TokenBudgetSampler(lengths, tokens, epoch=epoch + 1, **order))
        rest.set_epoch(epoch)
        assert list(rest) == whole[start:]


def test_rows_of_a_batch_are_of_similar_length(encoded):
    lengths = encoded.lengths
    spans = [np.ptp(lengths[rows]) for rows in TokenBudgetSampler(lengths, 128, bucket=32)]
    assert np.mean(spans) < np.ptp(lengths) / 4
    ordered = [i for rows in TokenBudgetSampler(lengths, 128, shuffle=False) for i in rows]
    assert (np.diff(lengths[ordered]) >= 0).all()


def test_order_is_a_function_of_seed_and_epoch(encoded):
    def order(seed, epoch):
        return list(TokenBudgetSampler(encoded.lengths, 128, seed=seed, epoch=epoch))

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2) != order(4, 2)


@pytest.mark.parametrize("given", [{"batch_size": 16}, {"tokens": 192}], ids=["rows", "tokens"])
def test_geometry_is_that_of_the_batches(encoded, given):
    batches = Batches(encoded, packed=True, multiple=64, seed=1, **given)
    made = list(batches)
    known = geometry(batches)
    assert known == geometry(iter(made))
    lengths = encoded.lengths
    assert known.batches == len(made) == len(batches)
    assert known.rows == len(encoded)
    assert known.real_tokens == lengths.sum()
    assert known.tokens == sum(batch["input_ids"].numel() for batch in made)
    assert known.squared == (lengths**2).sum()
    assert known.attended == known.real_tokens / known.tokens == 1 - known.padding
    twice = Geometry.total([known, known])
    assert (twice.batches, twice.rows, twice.tokens) == (
        2 * known.batches,
        2 * known.rows,
        2 * known.tokens,
    )
    assert twice.mean_length == known.mean_length


def test_batches_resume_and_keep_the_random_state(encoded):
    before = torch.get_rng_state()
    whole = list(Batches(encoded, tokens=192, packed=True, seed=2, epoch=1))
    rest = Batches(encoded, tokens=192, packed=True, seed=2)
    rest.resume(epoch=1, start=3)
    for got, wanted in zip(rest, whole[3:], strict=True):
        assert torch.equal(got["input_ids"], wanted["input_ids"])
        assert torch.equal(got["labels"], wanted["labels"])
    assert torch.equal(before, torch.get_rng_state())


def test_bad_arguments(encoded):
    with pytest.raises(UsageError, match="tokens: expected at least 60, the longest row, got 8"):
        TokenBudgetSampler([3, 60], 8)
    with pytest.raises(UsageError, match="batch_size: expected rows, or tokens, got neither"):
        Batches(encoded)
    with pytest.raises(UsageError, match="batch_size: expected none beside tokens, got 8"):
        Batches(encoded, batch_size=8, tokens=128)
    with pytest.raises(UsageError, match="packed: expected True for a budget of tokens"):
        Batches(encoded, tokens=128)
    with pytest.raises(UsageError, match="multiple: expected at least 1, got 0"):
        Batches(encoded, batch_size=8, packed=True, multiple=0)
    mixed = [next(iter(Batches(encoded, batch_size=8, packed=p))) for p in (True, False)]
    with pytest.raises(UsageError, match="batches: expected at least one batch, all padded"):
        geometry(mixed)
