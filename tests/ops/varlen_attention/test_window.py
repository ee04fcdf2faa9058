"""Windows: a query meets the keys that are near it, by every backend and in every count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sensikernels.ops.varlen_attention import flash, native, varlen_attention
from sensikernels.ops.varlen_attention.ops import pairs_of
from tests.ops.agreement import check_same_bits_on_any_threads
from tests.ops.varlen_attention.cases import offsets, operands, run, seed_of
from tests.ops.varlen_attention.test_varlen_attention import BACKENDS, DTYPES, check, need

LONG = [70, 5, 0, 211]


def met(queries: int, keys: int, window: int) -> Tensor:
    """bool ``[queries, keys]``, pair by pair."""
    pairs = [[abs(i - j) <= window for j in range(keys)] for i in range(queries)]
    return torch.tensor(pairs, dtype=torch.bool).view(queries, keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("window", [0, 1, 15, 16, 33, 64, 209, 210, 10**18])
def test_windows(window: int, dropout: float, backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, LONG, (24, 16), dropout=dropout, window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [[1, 1, 1, 1], [3, 0, 2, 150], [90, 40, 7, 211]], ids=str)
def test_other_queries(queries: list[int], backend: str, dtype: torch.dtype) -> None:
    """Some of them are beyond the last key: they meet none, and give zero."""
    check(backend, dtype, [70, 5, 0, 100], (16, 24), queries=queries, dropout=0.1, window=9)


@pytest.mark.parametrize("window", [0, 20, 100])
def test_bfloat16_widened(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PAIRS", False)
    check("native", torch.bfloat16, [17, 8, 140], (32, 23), dropout=0.1, window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", range(1, 150, 7))
def test_sequences_of_many_lengths(length: int, dtype: torch.dtype) -> None:
    """The last rows of a sequence meet bands of every width."""
    check("native", dtype, [length, 15], (33, 16), dropout=0.1, window=length // 3, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [210, 2**31, 2**63 - 1])
def test_a_window_over_all_is_none(window: int, backend: str, dtype: torch.dtype) -> None:
    need(backend)
    operand = operands(LONG, 2, (16, 16))
    named: dict[str, Any] = {"backend": backend, "dtype": dtype, "dropout": 0.1}
    windowed = run(*operand, LONG, window=window, **named)
    for mine, all_of_them in zip(windowed, run(*operand, LONG, **named), strict=True):
        assert torch.equal(mine, all_of_them)


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    window=st.integers(0, 160),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dropout=st.sampled_from([0.0, 0.3]),
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_window(lengths: list[int], sizes: tuple[int, int], backend: str, **named: Any) -> None:
    dtype = named.pop("dtype")
    check(backend, dtype, lengths, sizes, heads=2, **named)


@pytest.mark.parametrize("window", [0, 3, 8])
def test_the_definition_is_torchs_attention_under_a_mask(window: int) -> None:
    lengths = [4, 0, 9]
    q, k, v, _ = (x.double() for x in operands(lengths, 2, (8, 6)))
    named: dict[str, Any] = {"max_length": 9, "window": window, "backend": "reference"}
    out = varlen_attention(q, k, v, offsets(lengths), **named)
    at = offsets(lengths).tolist()
    for begin, end in zip(at, at[1:], strict=False):
        parts = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        mask = met(end - begin, end - begin, window)
        expected = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(0, 1)
        torch.testing.assert_close(out[begin:end], expected)


def test_a_window_is_transformers_sliding_window() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    config = pytest.importorskip("transformers").ModernBertConfig(local_attention=14)
    assert config.sliding_window == 7
    overlay = masking.sliding_window_bidirectional_overlay(config.sliding_window)
    pairs = [[bool(overlay(0, 0, i, j)) for j in range(30)] for i in range(30)]
    assert torch.equal(torch.tensor(pairs), met(30, 30, 7))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_definition(dropout: float) -> None:
    q, k, v, _ = operands([3, 0, 5], 2, (3, 2))
    leaves = tuple(x.double().requires_grad_() for x in (q, k, v))
    named: dict[str, Any] = {"max_length": 5, "dropout": dropout, "window": 1}

    def call(*x: Tensor) -> Tensor:
        at = offsets([3, 0, 5])
        return varlen_attention(*x, at, seed=seed_of(3), backend="reference", **named)

    assert torch.autograd.gradcheck(call, leaves)


def test_keys_outside_are_not_read() -> None:
    """What is in no row's band of keys takes no part, whatever it holds."""
    need("native")
    q, k, v, d = operands([300], 2, (8, 8))
    clean = run(q, k, v, d, [300], backend="native", dtype=torch.float32, window=4)
    k[250], v[250] = float("nan"), float("inf")
    got = run(q, k, v, d, [300], backend="native", dtype=torch.float32, window=4)
    assert bool(got[0][246:255].isnan().all())
    for mine, before in zip(got, clean, strict=True):
        assert torch.equal(mine[:128], before[:128])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_threads(dtype: torch.dtype) -> None:
    need("native")
    given = operands(LONG, 5, (32, 32))
    named: dict[str, Any] = {"backend": "native", "dtype": dtype, "dropout": 0.1, "window": 20}
    check_same_bits_on_any_threads(lambda: run(*given, LONG, **named))


def call_of(lengths: Sequence[int], queries: Sequence[int] | None, window: int | None) -> Any:
    """The operator's arguments."""
    q, k, v, _ = operands(lengths, 3, (16, 24), queries=queries)
    longest = max(lengths)
    asked = None if queries is None else offsets(queries)
    most = longest if queries is None else max(queries)
    return (q, k, v, asked, offsets(lengths), seed_of(1), most, longest, 1, 1.0, window, "buckets")


@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(0, 35), st.just(2**63 - 1)),
    apart=st.booleans(),
)
def test_pairs_are_counted_one_by_one(
    lengths: list[tuple[int, int]], window: int | None, apart: bool
) -> None:
    keys = [n for n, _ in lengths]
    queries = [n for _, n in lengths] if apart else keys
    reach = 100 if window is None else window
    expected = sum(int(met(a, b, reach).sum()) for a, b in zip(queries, keys, strict=True))
    assert pairs_of(call_of(keys, queries if apart else None, window)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_those_of_the_pairs(backend: str) -> None:
    need(backend)
    lengths, heads = [5, 17, 8], 3
    pairs = sum(int(met(n, n, 4).sum()) for n in lengths) * heads
    operand = operands(lengths, heads, (16, 24))
    with FlopCounterMode(display=False) as counter:
        run(*operand, lengths, backend=backend, dtype=torch.float32, window=4)
    assert counter.get_total_flops() == 2 * pairs * (16 + 24) + 2 * pairs * (3 * 16 + 2 * 24)


def test_pairs_without_data_are_the_most_there_can_be() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in call_of([40], None, 3)]
        assert pairs_of(tuple(fake)) == len(fake[0]) * 7


def test_flash_is_refused_where_it_counts_otherwise() -> None:
    """FlashAttention counts a window from the sequences' ends; queries apart would shift it."""
    half = torch.float16
    cpu = flash.refusal(torch.device("cpu"), half, 8, seeded=False, apart=False)
    assert cpu is not None
    assert cpu.startswith("it runs on CUDA")
    apart = flash.refusal(torch.device("cuda"), half, 8, seeded=False, apart=True)
    assert apart is not None
    assert "counted apart" in apart
