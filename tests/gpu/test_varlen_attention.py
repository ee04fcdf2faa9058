"""Attention over packed tokens on a GPU: torch's variable-length kernel, and buckets."""

from __future__ import annotations

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.ops.varlen_attention import explain, varlen_attention
from tests.ops.varlen_attention.cases import check_backend, offsets, operands, run, seed_of

pytestmark = pytest.mark.gpu
SERVED = [("flash", torch.float16), ("flash", torch.bfloat16), ("buckets", torch.float32)]
LENGTHS = [[5, 0, 1, 17], [128] * 8, [70, 129, 3], [1], [0, 0], []]


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths: list[int], backend: str, dtype: torch.dtype) -> None:
    check_backend(backend, dtype, lengths, (64, 64), heads=4, device="cuda")


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("sizes", [(32, 32), (7, 20), (33, 16), (128, 100)])
def test_trimmed_heads(sizes: tuple[int, int], backend: str, dtype: torch.dtype) -> None:
    check_backend(backend, dtype, [9, 2, 60], sizes, heads=4, device="cuda")


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_other_queries(backend: str, dtype: torch.dtype) -> None:
    named = {"queries": [1, 1, 1], "heads": 4, "device": "cuda"}
    check_backend(backend, dtype, [11, 4, 30], (64, 64), **named)


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("window", [0, 7, 64, 500])
def test_windows(window: int, backend: str, dtype: torch.dtype) -> None:
    check_backend(backend, dtype, [70, 0, 3, 300], (64, 64), heads=4, window=window, device="cuda")


def test_flash_refuses_a_window_over_queries_apart() -> None:
    half = torch.zeros(3, 1, 8, device="cuda", dtype=torch.half)
    assert explain(half, half, apart=True).backend == "buckets"


def test_buckets_draw_the_masks_of_the_cpu() -> None:
    lengths = [5, 33, 12]
    given = operands(lengths, 2, (16, 16))
    on_gpu, on_cpu = (
        run(
            *(x.to(device) for x in given),
            lengths,
            backend="buckets",
            dtype=torch.float32,
            dropout=0.3,
        )
        for device in ("cuda", "cpu")
    )
    for got, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_flash_dropout_keeps_the_mean_and_its_mask() -> None:
    """With equal scores and V = 1, out is the kept share; dV of one key sums what it was given."""
    rows, p = 256, 0.25
    q = torch.zeros(rows, 4, 32, device="cuda", dtype=torch.float16)
    v = torch.ones(rows, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    at = offsets([128, 128], "cuda")
    torch.manual_seed(3)
    out = varlen_attention(q, q, v, at, max_length=128, dropout=p, backend="flash")
    assert float(out.float().mean()) == pytest.approx(1.0, abs=0.02)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    assert float(dv.float().sum()) == pytest.approx(float(out.detach().float().sum()), rel=2e-3)
    torch.manual_seed(3)
    assert torch.equal(
        out, varlen_attention(q, q, v, at, max_length=128, dropout=p, backend="flash")
    )


def test_choice() -> None:
    half, single = (torch.zeros(3, 1, 8, device="cuda", dtype=t) for t in (torch.half, torch.float))
    assert explain(half, half).backend == "flash"
    assert explain(half, half, seeded=True).backend == "buckets"
    assert explain(single, single).backend == "buckets"
    seed = seed_of(1, "cuda")
    with pytest.raises(UsageError, match="flash cannot serve this call: it draws dropout"):
        varlen_attention(
            half,
            half,
            half,
            offsets([3], "cuda"),
            max_length=3,
            dropout=0.1,
            seed=seed,
            backend="flash",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_whole(dtype: torch.dtype) -> None:
    given = [x.to(dtype).requires_grad_() for x in operands([9, 60], 2, (32, 32), device="cuda")]
    q, k, v, _ = given
    at = offsets([9, 60], "cuda")
    compiled = torch.compile(
        lambda q, k, v: varlen_attention(q, k, v, at, max_length=60), fullgraph=True
    )
    out, plain = compiled(q, k, v), varlen_attention(q, k, v, at, max_length=60)
    torch.testing.assert_close(out, plain)
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_operator_checks(backend: str, dtype: torch.dtype) -> None:
    q, k, v, d = (x.to(dtype) for x in operands([5, 0, 9], 2, (8, 12), device="cuda"))
    at = offsets([5, 0, 9], "cuda")
    call = (q, k, v, None, at, seed_of(1, "cuda"), 9, 9, 65536, 0.3, backend)
    torch.library.opcheck(torch.ops.sensikernels.varlen_attention.default, call)
    saved = torch.ops.sensikernels.varlen_attention(*call)
    backward = torch.ops.sensikernels.varlen_attention_backward.default
    torch.library.opcheck(backward, (d, *saved, *call))
