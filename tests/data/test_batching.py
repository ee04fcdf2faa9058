from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.data import (
    Batches,
    Examples,
    LengthBucketSampler,
    collate,
    embedded_model_path,
    encode,
    geometry,
    load,
)


class Words:
    """A tokenizer in HuggingFace's form: a word's id is its length, 1 and 2 are the brackets."""

    pad_token_id = 7
    calls = 0

    def __init__(self, types: bool = True) -> None:
        self.types = types

    def __call__(self, a, b=None, *, truncation, max_length, padding, return_attention_mask):
        assert truncation
        assert not padding
        assert not return_attention_mask
        self.calls += 1
        ids, types = [], []
        for first, second in zip(a, b or [None] * len(a), strict=True):
            row = [1, *(10 + len(w) for w in first.split()), 2]
            kinds = [0] * len(row)
            if second is not None:
                tail = [*(10 + len(w) for w in second.split()), 2]
                row, kinds = row + tail, kinds + [1] * len(tail)
            ids.append(row[:max_length])
            types.append(kinds[:max_length])
        return {"input_ids": ids} | ({"token_type_ids": types} if self.types else {})


def examples(rows, pair=False, dtype=np.int64):
    return Examples(
        texts_a=["word " * (i % 29 + 1) for i in range(rows)],
        texts_b=["pair " * (i % 7 + 1) for i in range(rows)] if pair else None,
        labels=np.arange(rows).astype(dtype) % 2,
    )


@pytest.fixture
def encoded():
    return encode(examples(203), Words())


def test_encode_is_flat():
    data = encode(examples(5000, pair=True), Words())
    assert data.input_ids.dtype == data.token_type_ids.dtype == np.int32
    assert len(data) == 5000
    assert data.offsets[-1] == len(data.input_ids) == len(data.token_type_ids)
    ids, types, label = data[4999]  # 4999 % 29 + 1 = 12 words, 4999 % 7 + 1 = 2
    assert ids.tolist() == [1, *[14] * 12, 2, 14, 14, 2]
    assert types.tolist() == [0] * 14 + [1] * 3
    assert label == 1
    assert data.lengths[4999] == 17


def test_encode_calls_the_tokenizer_in_parts():
    words = Words()
    encode(examples(5000), words)
    assert words.calls == 2


def test_encode_truncates():
    assert encode(examples(100), Words(), max_length=16).lengths.max() == 16


def test_encode_needs_padding_and_room():
    words = Words()
    words.pad_token_id = None
    with pytest.raises(UsageError, match="tokenizer: expected one with a pad_token_id"):
        encode(examples(3), words)
    with pytest.raises(UsageError, match="max_length: expected at least 3, got 2"):
        encode(examples(3), Words(), max_length=2)


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_collate_pads_to_a_multiple(encoded, multiple):
    rows = [encoded[i] for i in (0, 11, 5)]  # 3, 14 and 8 tokens
    batch = collate(rows, pad_token_id=7, pad_to_multiple=multiple)
    length = -(-14 // multiple) * multiple
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].shape == (3, length)
        assert batch[name].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [3, 14, 8]
    assert batch["input_ids"][0].tolist() == [1, 14, 2] + [7] * (length - 3)
    assert batch["labels"].tolist() == [0, 1, 1]
    assert batch["labels"].dtype == torch.int64


def test_collate_scores_and_absent_types():
    data = encode(examples(4, dtype=np.float32), Words(types=False))
    batch = collate([data[i] for i in range(4)], pad_token_id=7)
    assert batch["labels"].dtype == torch.float32
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


lengths_and_size = given(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)


@lengths_and_size
def test_every_row_once_and_at_most_one_short_batch(lengths, size, bucket, seed, epoch):
    sampler = LengthBucketSampler(lengths, size, seed=seed, epoch=epoch, bucket=bucket)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) != size for batch in batches) <= 1
    assert len(batches) == len(sampler)


@lengths_and_size
def test_resumes_anywhere(lengths, size, bucket, seed, epoch):
    whole = list(LengthBucketSampler(lengths, size, seed=seed, epoch=epoch, bucket=bucket))
    for start in {0, len(whole) // 2, len(whole)}:
        rest = LengthBucketSampler(
            lengths, size, seed=seed, epoch=epoch, start=start, bucket=bucket
        )
        assert list(rest) == whole[start:]
        assert len(rest) == len(whole) - start
        rest.set_epoch(epoch + 1)
        assert len(rest) == len(whole)
        rest.set_epoch(epoch)
        assert list(rest) == whole[start:]


def test_order_is_a_function_of_seed_and_epoch(encoded):
    def order(seed, epoch):
        return list(LengthBucketSampler(encoded.lengths, 8, seed=seed, epoch=epoch))

    assert order(3, 1) == order(3, 1)
    assert len({str(order(*at)) for at in [(3, 1), (3, 2), (1, 3), (4, 1)]}) == 4


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 60, 4096)
    spread = [np.ptp(lengths[rows]) for rows in LengthBucketSampler(lengths, 32)]
    assert np.mean(spread) < 5  # unsorted batches of 32 spread over about 52
    order = [lengths[rows].mean() for rows in LengthBucketSampler(lengths, 32)]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


def test_without_shuffling_rows_are_sorted(encoded):
    rows = [i for batch in LengthBucketSampler(encoded.lengths, 8, shuffle=False) for i in batch]
    assert (np.diff(encoded.lengths[rows]) >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"bucket": 0}, "bucket: expected at least 1 batch, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"epoch": -1}, "epoch: expected at least 0, got -1"),
        ({"start": 5}, r"start: expected a batch index in 0\.\.4, got 5"),
        ({"start": -1}, "start: expected a batch index"),
        ({"lengths": []}, r"lengths: expected \[rows\], rows >= 1, got shape \(0,\)"),
    ],
)
def test_sampler_arguments(change, message):
    with pytest.raises(UsageError, match=message):
        LengthBucketSampler(**({"lengths": [3] * 16, "batch_size": 4} | change))


def test_batches_geometry_is_that_of_the_tensors(encoded):
    batches = Batches(encoded, batch_size=16, bucket=4)
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert len(shapes) == len(batches) == 13
    assert {length % 8 for _, length in shapes} == {0}
    fast, slow = geometry(batches), geometry(list(batches))
    assert fast == slow
    assert fast.batches == 13
    assert fast.rows == 203
    assert fast.tokens == sum(b * s for b, s in shapes)
    assert fast.squared == sum(b * s * s for b, s in shapes)
    assert fast.real_tokens == encoded.offsets[-1]
    assert fast.mean_length == fast.squared / fast.tokens
    assert 0 < fast.padding < 0.5


def test_geometry_of_nothing():
    with pytest.raises(UsageError, match="batches: expected at least one batch"):
        geometry([])


def test_few_shapes_by_construction():
    lengths = np.random.default_rng(0).integers(5, 60, 8192)
    data = encode(
        Examples(texts_a=["w " * (n - 2) for n in lengths], texts_b=None, labels=lengths), Words()
    )
    assert len(geometry(Batches(data, batch_size=32)).shapes) <= 8


def test_pad_to_multiple_below_one(encoded):
    with pytest.raises(UsageError, match="pad_to_multiple: expected at least 1"):
        Batches(encoded, batch_size=4, pad_to_multiple=0)


def test_iterating_leaves_the_random_state_alone(encoded):
    before = torch.get_rng_state()
    assert len(list(Batches(encoded, batch_size=16))) == 13
    assert torch.equal(before, torch.get_rng_state())


def labels(batches):
    return [batch["input_ids"].tolist() for batch in batches]


def test_accelerate_prepares_and_resumes(encoded):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = Batches(encoded, batch_size=16, seed=5)
    ready = accelerator.prepare(Batches(encoded, batch_size=16, seed=5))
    epochs = []
    for epoch in range(2):
        plain.set_epoch(epoch)
        epochs.append(labels(plain))
        before = torch.get_rng_state()
        assert labels(ready) == epochs[-1]
        assert torch.equal(before, torch.get_rng_state())
    assert epochs[0] != epochs[1]

    part = Batches(encoded, batch_size=16, seed=5)
    again = accelerator.prepare(part)
    part.resume(epoch=1, start=9)
    again.set_epoch(1)
    assert len(again) == 4
    assert labels(again) == epochs[1][9:]


def test_a_real_tokenizer():
    transformers = pytest.importorskip("transformers")
    try:
        folder = embedded_model_path()
    except UsageError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = load("demo", split="dev", max_samples=20)
    pairs = Examples(texts_a=rows.texts_a, texts_b=rows.texts_a[::-1], labels=rows.labels)
    for part in (rows, pairs):
        data = encode(part, tokenizer)
        (batch,) = Batches(data, batch_size=20, shuffle=False, pad_to_multiple=1)
        order = np.argsort(data.lengths, kind="stable")
        texts = [part.texts_a[i] for i in order]
        second = [None] * 20 if part.texts_b is None else [part.texts_b[i] for i in order]
        expected = tokenizer(
            texts, None if part.texts_b is None else second, padding=True, return_tensors="pt"
        )
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert torch.equal(batch[name], expected[name])
        assert batch["labels"].tolist() == part.labels[order].tolist()
