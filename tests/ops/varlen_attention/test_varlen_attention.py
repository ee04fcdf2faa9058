"""Attention over packed tokens: every backend against the definition, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sensikernels._core import extension
from sensikernels.ops.varlen_attention import native, varlen_attention
from sensikernels.ops.varlen_attention import reference as ref
from tests.ops.agreement import check_same_bits_on_any_threads
from tests.ops.varlen_attention.cases import check_backend, offsets, operands, run, seed_of

BACKENDS = ["native", "buckets"]
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [
    [5, 0, 1, 17],
    [16] * 3,
    [8, 40, 33, 12],
    [70, 129, 3],
    [1],
    [0, 0],
    [],
]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def check(
    backend: str, dtype: torch.dtype, lengths: Sequence[int], *call: Any, **named: Any
) -> None:
    need(backend)
    check_backend(backend, dtype, lengths, *call, **named)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths: list[int], dropout: float, backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, lengths, (32, 32), dropout=dropout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 20), (33, 16), (64, 100), (80, 5)])
def test_trimmed_heads(sizes: tuple[int, int], backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, [9, 2, 21], sizes, dropout=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [[1, 1, 1, 1], [3, 0, 2, 90]], ids=str)
def test_other_queries(queries: list[int], backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, [11, 4, 0, 19], (16, 24), queries=queries, dropout=0.1)


@pytest.mark.parametrize("lengths", [[17, 8, 70], [1, 129]], ids=str)
def test_bfloat16_widened(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a processor that cannot multiply bfloat16."""
    monkeypatch.setattr(native, "PAIRS", False)
    check("native", torch.bfloat16, lengths, (32, 23), dropout=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [None, [3, 3]], ids=str)
def test_equal_lengths_in_buckets(queries: list[int] | None, dtype: torch.dtype) -> None:
    check("buckets", dtype, [21, 21], (16, 24), queries=queries, dropout=0.1)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dropout=st.sampled_from([0.0, 0.3]),
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_lengths(
    lengths: list[int],
    sizes: tuple[int, int],
    dropout: float,
    backend: str,
    dtype: torch.dtype,
) -> None:
    check(backend, dtype, lengths, sizes, dropout=dropout, heads=2)


def test_definition_is_torchs_attention() -> None:
    lengths = [4, 0, 9]
    q, k, v, _ = (x.double() for x in operands(lengths, 2, (8, 6)))
    out = varlen_attention(q, k, v, offsets(lengths), max_length=9, backend="reference")
    at = offsets(lengths).tolist()
    for begin, end in zip(at, at[1:], strict=False):
        parts = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*parts).transpose(0, 1)
        torch.testing.assert_close(out[begin:end], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_definition(dropout: float) -> None:
    q, k, v, _ = operands([3, 0, 4], 2, (3, 2))
    given = tuple(x.double().requires_grad_() for x in (q, k, v))

    def call(*x: torch.Tensor) -> torch.Tensor:
        return varlen_attention(
            *x,
            offsets([3, 0, 4]),
            max_length=4,
            dropout=dropout,
            seed=seed_of(3),
            backend="reference",
        )

    assert torch.autograd.gradcheck(call, given)
    buckets = [
        run(q, k, v, v, [3, 0, 4], backend=name, dtype=torch.float64, dropout=dropout)
        for name in ("buckets", "reference")
    ]
    for got, expected in zip(*buckets, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_the_definitions(backend: str) -> None:
    """With V = 1 at one key, out is that key's dropped probability."""
    need(backend)
    lengths, p = [21, 40, 9], 0.3
    rows, longest = sum(lengths), max(lengths)
    q = torch.zeros(rows, 2, 4)
    v = torch.zeros(rows, 2, longest)
    at = offsets(lengths)
    for begin, end in zip(at.tolist(), at[1:].tolist(), strict=False):
        v[begin:end] = torch.eye(end - begin, longest)[:, None]
    out = varlen_attention(
        q, q, v, at, max_length=longest, dropout=p, seed=seed_of(5), backend=backend
    )
    draws = ref.draws(seed_of(5), at[:-1], 2, longest, longest)
    for s, (begin, n) in enumerate(zip(at.tolist(), lengths, strict=False)):
        kept = draws[s, :, :n, :n] < round((1 - p) * ref.DRAWS)
        assert torch.equal(out[begin : begin + n, :, :n].transpose(0, 1) != 0, kept)


def test_draws_are_uniform_and_distinct() -> None:
    draws = ref.draws(seed_of(1), offsets([64, 64, 64])[:-1], 4, 64, 64)
    n = draws.numel()
    share = float((draws < 0.9 * ref.DRAWS).float().mean())
    assert share == pytest.approx(0.9, abs=4 * (0.09 / n) ** 0.5)
    rows = draws.flatten(0, 2).tolist()
    assert len({tuple(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_dropped(backend: str) -> None:
    need(backend)
    given = operands([5, 6], 2, (8, 8))
    for got in run(*given, [5, 6], backend=backend, dtype=torch.float32, dropout=1.0):
        assert not got.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_one_projection(backend: str, dtype: torch.dtype) -> None:
    need(backend)
    lengths, heads, size = [5, 18, 2], 3, 12
    fused = torch.randn(sum(lengths), 3 * heads * size).to(dtype).requires_grad_()
    parts = [x.view(-1, heads, size) for x in fused.chunk(3, 1)]
    assert not parts[0].is_contiguous()
    at = offsets(lengths)
    out = varlen_attention(*parts, at, max_length=18, backend=backend)
    dout = torch.randn(size, heads, sum(lengths)).to(dtype).permute(2, 1, 0)
    (grad,) = torch.autograd.grad(out, fused, dout)
    expected = run(*parts, dout.contiguous(), lengths, backend=backend, dtype=dtype)
    assert torch.equal(out, expected[0])
    assert torch.equal(grad, torch.cat([x.flatten(1) for x in expected[1:]], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_threads(dtype: torch.dtype) -> None:
    need("native")
    lengths = [5, 40, 129, 16, 1, 0, 77]
    given = operands(lengths, 5, (32, 32))
    check_same_bits_on_any_threads(
        lambda: run(*given, lengths, backend="native", dtype=dtype, dropout=0.1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str) -> None:
    need(backend)
    q, k, v, d = operands([30], 1, (16, 16))
    for factor in (30.0, 1e4):
        out = run(q * factor, k, v, d, [30], backend=backend, dtype=torch.float32)
        assert all(bool(x.isfinite().all()) for x in out)


def test_not_finite_stays_in_its_sequence() -> None:
    need("native")
    q, k, v, d = operands([6, 20], 2, (8, 8))
    clean = run(q, k, v, d, [6, 20], backend="native", dtype=torch.float32)
    k[2] = float("nan")
    got = run(q, k, v, d, [6, 20], backend="native", dtype=torch.float32)
    assert bool(got[0][:6].isnan().all())
    for mine, before in zip(got, clean, strict=True):
        assert torch.equal(mine[6:], before[6:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_those_of_the_products(backend: str) -> None:
    need(backend)
    lengths, heads = [5, 17, 8], 3
    pairs = sum(n * n for n in lengths) * heads
    given = operands(lengths, heads, (16, 24))
    with FlopCounterMode(display=False) as counter:
        run(*given, lengths, backend=backend, dtype=torch.float32, dropout=0.1)
    assert counter.get_total_flops() == 2 * pairs * (16 + 24) + 2 * pairs * (3 * 16 + 2 * 24)
