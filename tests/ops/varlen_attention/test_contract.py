"""The operator as torch sees it: opcheck, compile, autocast, seeds, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.varlen_attention import explain, varlen_attention
from tests.ops.varlen_attention.cases import offsets, operands, run, seed_of

BACKENDS = ["native", "buckets"]
_OPS = torch.ops.sensikernels


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 3])
def test_operator_checks(window: int | None, backend: str, dtype: torch.dtype) -> None:
    need(backend)
    q, k, v, d = (x.to(dtype) for x in operands([5, 0, 9], 2, (8, 12)))
    at, rest = offsets([5, 0, 9]), (9, 9, 60_000, 0.3, window, backend)
    call = (q, k, v.transpose(0, 1).contiguous().transpose(0, 1), None, at, seed_of(1), *rest)
    torch.library.opcheck(_OPS.varlen_attention.default, call)
    saved = _OPS.varlen_attention(*call)
    torch.library.opcheck(_OPS.varlen_attention_backward.default, (d, *saved, *call))


@pytest.mark.parametrize("backend", ["auto", "buckets", "reference"])
def test_compiles_whole(backend: str) -> None:
    def attend(fused: Tensor, at: Tensor) -> Tensor:
        q, k, v = fused.view(-1, 3, 2, 8).unbind(1)
        named = {"max_length": 9, "dropout": 0.1, "window": 2, "backend": backend}
        return varlen_attention(q, k, v, at, **named).sum()  # type: ignore[arg-type]

    fused = torch.randn(14, 48, requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    compiled(fused, offsets([5, 9])).backward()
    assert fused.grad is not None
    assert bool(fused.grad.isfinite().all())
    whole = torch.compile(
        lambda *x: varlen_attention(*x, max_length=9, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    given = (*torch.randn(3, 14, 2, 8).unbind(), offsets([5, 9]))
    expected = varlen_attention(*given, max_length=9, backend=backend)
    torch.testing.assert_close(whole(*given), expected)


@pytest.mark.parametrize("backend", ["native", "buckets", "reference"])
def test_autocast(backend: str) -> None:
    need(backend)
    q, k, v, _ = operands([5, 9], 2, (8, 8))
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(q, k, v.bfloat16(), offsets([5, 9]), max_length=9, backend=backend)
    assert out.dtype == torch.bfloat16
    half = (x.detach().bfloat16() for x in (q, k, v))
    assert torch.equal(out, varlen_attention(*half, offsets([5, 9]), max_length=9, backend=backend))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_follow_torchs_seed(backend: str) -> None:
    need(backend)
    given = operands([30, 9], 2, (8, 8))

    def call(seed: int | None) -> list[Tensor]:
        return run(*given, [30, 9], backend=backend, dtype=torch.float32, dropout=0.3, seed=seed)

    torch.manual_seed(5)
    first, second = call(None), call(None)
    torch.manual_seed(5)
    again = call(None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])


def test_without_dropout_no_number_is_drawn() -> None:
    before = torch.get_rng_state()
    q, k, v, _ = operands([3], 1, (4, 4))
    torch.set_rng_state(before)
    varlen_attention(q, k, v, offsets([3]), max_length=3)
    assert torch.equal(before, torch.get_rng_state())


def test_explain() -> None:
    x = torch.randn(3, 1, 4)
    assert str(explain(x.half(), x.half())).startswith("buckets (native: it serves")
    assert str(explain(x, x, "reference")) == "reference (asked for by name)"
    if extension.available():
        half = x.bfloat16()
        for given in (x, half):
            assert str(explain(given, given)) == "native (the fastest for cpu)"


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"query": torch.randn(14, 16)},
        r"query: expected \[tokens_q, heads, qk_size\], got \[14, 16\]",
    ),
    ({"query": torch.ones(14, 2, 8, dtype=torch.int64)}, "query: expected a floating dtype"),
    ({"query": torch.randn(13, 2, 8)}, "query: expected 14 rows as key, got 13"),
    ({"key": torch.randn(14, 2, 9)}, r"key: expected \[tokens, 2, 8\]"),
    ({"value": torch.randn(14, 3, 8)}, r"value: expected \[14, 2, vo_size\]"),
    ({"value": torch.randn(14, 2, 8).double()}, "key, value: expected torch.float32 as query"),
    ({"cu_seqlens": torch.tensor([0, 5, 14])}, r"cu_seqlens: expected int32 \[sequences \+ 1\]"),
    ({"cu_seqlens": offsets([5, 10])}, "cu_seqlens: expected at most 14 rows, got 15"),
    ({"cu_seqlens": offsets([5, -2])}, "cu_seqlens: expected ascending offsets"),
    ({"cu_seqlens": offsets([5, 9]) + 1}, "cu_seqlens: expected 0 first, got 1"),
    ({"max_length": 8}, "max_length: expected at least the longest sequence, 9, got 8"),
    ({"max_length": -1}, "max_length: expected a length, got -1"),
    ({"max_length_query": 8}, "max_length_query: expected None for self attention, got 8"),
    ({"cu_seqlens_query": offsets([5, 9])}, "max_length_query: expected the longest query count"),
    ({"cu_seqlens_query": offsets([5]), "max_length_query": 5}, "cu_seqlens_query: expected"),
    (
        {"cu_seqlens_query": offsets([5, 9]), "max_length_query": 7},
        "max_length_query: expected at least the longest sequence, 9, got 7",
    ),
    ({"window": -1}, "window: expected a number of tokens, 0 or more, or None, got -1"),
    ({"window": 2.0}, "window: expected a number of tokens, 0 or more, or None, got 2.0"),
    ({"window": True}, "window: expected a number of tokens, 0 or more, or None, got True"),
    ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\], got 1.5"),
    ({"seed": torch.tensor(1.0)}, r"seed: expected int64 \[\]"),
    ({"backend": "triton"}, "backend: expected one of auto, buckets, flash, native, reference"),
    ({"backend": "flash"}, "backend: flash cannot serve this call: it runs on CUDA"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    q, k, v = (torch.randn(14, 2, 8) for _ in range(3))
    call: dict[str, Any] = {"query": q, "key": k, "value": v, "cu_seqlens": offsets([5, 9])}
    call = {**call, "max_length": 9, **change}
    with pytest.raises(UsageError, match=message):
        varlen_attention(**call)
