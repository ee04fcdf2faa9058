"""select_elements: exactly k entries, the same ones as a stable sort, whatever the backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core import extension
from sensikernels._core.bits import pack_bits, unpack_bits
from sensikernels._core.errors import UsageError
from sensikernels.ops.select_kept import explain, select_elements
from sensikernels.ops.select_kept.elements import NEEDS_GRAD, SCORES
from tests.ops.select_kept.cases import entries

native = pytest.mark.skipif(not extension.available(), reason="no compiled extension")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same(one, two):
    assert torch.equal(one.arena, two.arena)
    assert torch.equal(one.counts, two.counts)
    torch.testing.assert_close(one.threshold, two.threshold, rtol=0, atol=0, equal_nan=True)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_native_equals_the_sort(score: str, dtype: torch.dtype):
    shapes = [(300, 201), (5,), (), (0, 3), (77, 1001)]
    tensors = entries(shapes, dtype)
    grads = entries(shapes, torch.float16) if score in NEEDS_GRAD else None
    total = sum(t.numel() for t in tensors)
    for k in (0, 1, 2, 1000, total // 10, total // 2, total - 3, total):
        got = select_elements(tensors, grads, k=k, score=score, backend="native")
        assert_same(got, select_elements(tensors, grads, k=k, score=score, backend="reference"))
        assert int(got.counts.sum()) == k
    k = [t.numel() // 3 for t in tensors]
    arguments = {"k": k, "score": score, "scope": "per_tensor"}
    got = select_elements(tensors, grads, backend="native", **arguments)
    assert_same(got, select_elements(tensors, grads, backend="reference", **arguments))
    assert got.counts.tolist() == k


@native
@given(st.integers(0, 60_000), st.sampled_from([1, 2, 40, 5000]))
def test_ties_go_to_the_lowest(k: int, distinct: int):
    """Sizes on both sides of the sample's limit, with many, few or hardly any equal scores."""
    tensors = [torch.randint(0, distinct, (59_000,)).float(), torch.zeros(1000)]
    got = select_elements(tensors, k=k, backend="native")
    assert_same(got, select_elements(tensors, k=k, backend="reference"))


def test_reference_by_hand():
    kept = select_elements(
        [torch.tensor([[3.0, 1.0], [2.0, 3.0]]), torch.tensor([3.0])], k=2, backend="reference"
    )
    assert kept.grid(0).tolist() == [[True, False], [False, True]]
    assert kept.packed(0).tolist() == [0b1001]
    assert kept.packed(1).tolist() == [0]
    assert kept.threshold.tolist() == [3.0]
    assert kept.counts.tolist() == [2, 0]


@given(st.integers(0, 70))
def test_packing_round_trip(n: int):
    bits = torch.rand(n) < 0.5
    packed = pack_bits(bits)
    assert torch.equal(unpack_bits(packed, n), bits)
    assert all(bool(packed[i // 8] >> i % 8 & 1) == bool(bits[i]) for i in range(n))


@native
def test_threads_do_not_change_the_bits():
    tensors = [torch.randn(400, 777), torch.randn(99_999).bfloat16()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = select_elements(tensors, k=30_000, backend="native")
        torch.set_num_threads(2)
        assert_same(one, select_elements(tensors, k=30_000, backend="native"))
    finally:
        torch.set_num_threads(before)


@native
def test_strided_tensors_and_op_contract():
    t = torch.randn(64, 90)[:, 3:70]
    got = select_elements([t, t.t()], k=999, backend="native")
    assert_same(got, select_elements([t, t.t()], k=999, backend="reference"))
    assert str(explain([t])) == "native (the fastest that serves cpu tensors)"
    flat = torch.randn(1000)
    arguments = ([flat], [flat], [0], 128, [100], 0)
    torch.library.opcheck(torch.ops.sensikernels.select_elements, arguments)


@native
@pytest.mark.slow
def test_hundred_million_entries():
    """Counts, and that the lowest kept score is the highest one left."""
    n = 10**8
    scores = torch.randn(n)
    kept = select_elements([scores], k=n // 10)
    threshold = float(kept.threshold)
    bits = kept.grid(0)
    assert int(bits.sum()) == n // 10
    assert float(scores[bits].min()) == threshold
    assert float(scores[~bits].max()) <= threshold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 7}, r"k: expected an integer in \[0, 6\], got 7"),
        ({"k": [1, 1], "scope": "per_tensor"}, "k: expected one count per tensor, 1, got 2"),
        ({"k": 1, "score": "abs_wg"}, "grads: expected gradients, which abs_wg needs, got none"),
        ({"k": 1, "grads": [torch.ones(6)]}, "grads: expected none, as value needs none"),
        ({"k": 1, "score": "fisher"}, "score: expected one of"),
        ({"k": 1, "backend": "triton"}, "backend: triton cannot serve this call"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UsageError, match=message):
        select_elements([torch.ones(6)], **arguments)
