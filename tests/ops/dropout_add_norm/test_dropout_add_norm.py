"""Dropout, residual and LayerNorm in one: as good as PyTorch's parts, the mask of ``dropout``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.dropout import dropout
from sensikernels.ops.dropout_add_norm import dropout_add_norm, explain
from tests.ops.agreement import check_autocast_changes_nothing, check_same_bits_on_any_threads
from tests.ops.dropout_add_norm.cases import DTYPES, SEED, parts, run
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference", "native"]
SHAPES = [(0, 8), (1, 17), (3, 5), (2, 9, 100), (40, 129), (130, 384), (7,)]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def ours(p: float, backend: str = "auto") -> Callable[..., Tensor]:
    return lambda *leaves: dropout_add_norm(*leaves, dropout=p, seed=SEED, backend=backend)


def leaves_of(shape: tuple[int, ...], dtype: torch.dtype, affine: torch.dtype) -> list[Tensor]:
    rows = [torch.randn(shape).to(dtype) for _ in range(2)]
    return [*rows, (torch.rand(shape[-1]) + 0.5).to(affine), torch.randn(shape[-1]).to(affine)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_as_good_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...], p: float):
    need(backend)
    for affine in {dtype, torch.float32}:
        leaves, dy = leaves_of(shape, dtype, affine), torch.randn(shape).to(dtype)
        got = run(ours(p, backend), leaves, dy)
        same = run(parts(p), leaves, dy)
        exact = run(parts(p), [t.double() for t in leaves], dy.double())
        for one, torch_own, truth in zip(got, same, exact, strict=True):
            assert_close_to_reference(one, torch_own.to(one.dtype), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_does_not_cancel(backend: str):
    need(backend)
    leaves = leaves_of((20, 300), torch.float32, torch.float32)
    leaves[1] = leaves[1] + 1000
    dy = torch.randn(20, 300)
    got, same = run(ours(0.0, backend), leaves, dy), run(parts(0.0), leaves, dy)
    exact = run(parts(0.0), [t.double() for t in leaves], dy.double())
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(one, torch_own, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_that_of_dropout(backend: str):
    """Dropped elements get no gradient and hide what is not finite."""
    need(backend)
    shape = (37, 100)
    x = torch.full(shape, float("nan"))
    kept = dropout(torch.ones(shape), 0.5, seed=SEED) != 0
    x[kept] = 1.0
    leaves = [x, *leaves_of(shape, torch.float32, torch.float32)[1:]]
    y, dx, *_ = run(ours(0.5, backend), leaves, torch.randn(shape))
    assert y.isfinite().all()
    assert torch.equal(dx != 0, kept)


def test_seed_from_torch():
    leaves = leaves_of((30, 64), torch.float32, torch.float32)
    torch.manual_seed(5)
    first, second = (dropout_add_norm(*leaves, dropout=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, dropout_add_norm(*leaves, dropout=0.5))
    assert not torch.equal(first, second)


def test_one_and_two_threads_sum_alike():
    need("native")
    leaves, dy = leaves_of((5000, 96), torch.float32, torch.float32), torch.randn(5000, 96)
    check_same_bits_on_any_threads(lambda: run(ours(0.1), leaves, dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend: str):
    need(backend)
    leaves = leaves_of((8, 6, 10), torch.float32, torch.float32)
    leaves = [leaves[0].permute(2, 1, 0), leaves[1].transpose(0, 2)]
    leaves += [torch.rand(16)[::2] + 0.5, torch.randn(8)]
    dy = torch.randn(1, 1, 8).expand(10, 6, 8)
    for one, truth in zip(
        run(ours(0.3, backend), leaves, dy), run(parts(0.3), leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, truth, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_what_needs_a_gradient(backend: str, which: int, p: float):
    need(backend)
    leaves = leaves_of((9, 24), torch.float32, torch.float32)
    leaves[which].requires_grad_()
    dy = torch.randn(9, 24)
    (got,) = torch.autograd.grad(ours(p, backend)(*leaves), leaves[which], dy)
    (truth,) = torch.autograd.grad(parts(p)(*leaves), leaves[which], dy)
    torch.testing.assert_close(got, truth, atol=2e-5, rtol=2e-5)


def test_one_tensor_in_both_places():
    x = torch.randn(9, 24, requires_grad=True)
    weight, bias = torch.rand(24), torch.randn(24)
    dropout_add_norm(x, x, weight, bias).backward(dy := torch.randn(9, 24))
    (truth,) = torch.autograd.grad(F.layer_norm(2 * x, (24,), weight, bias, 1e-12), x, dy)
    torch.testing.assert_close(x.grad, truth, atol=2e-5, rtol=2e-5)


def test_saves_no_mask():
    need("native")
    leaves = [t.requires_grad_() for t in leaves_of((16, 32), torch.bfloat16, torch.bfloat16)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout_add_norm(*leaves, dropout=0.1)
    assert sorted(t.numel() for t in saved) == [1, 32, 32, 16 * 32]


def test_gradients_of_gradients():
    leaves = [t.requires_grad_() for t in leaves_of((3, 6), torch.float64, torch.float64)]
    assert explain(leaves[0]).backend == "reference"
    assert torch.autograd.gradcheck(ours(0.4), leaves)
    assert torch.autograd.gradgradcheck(ours(0.4), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["whole", "dropout"])
def test_operator_checks(backend: str, dtype: torch.dtype, seed: Tensor | None):
    need(backend)
    ops = torch.ops.sensikernels
    x, residual, weight, bias = leaves_of((2, 6, 8), dtype, torch.float32)
    threshold = 65536 if seed is None else 60_000
    for save in (True, False):
        arguments = (x, residual, weight, bias, seed, threshold, 1e-12, save, backend)
        torch.library.opcheck(ops.dropout_add_norm.default, arguments)
    y, total, moments = ops.dropout_add_norm(
        x, residual, weight, bias, seed, threshold, 1e-12, True, backend
    )
    for before, shift in ((total, None), (y, bias)):
        for needed in (True, False):
            arguments = (torch.randn_like(x), before, moments, weight, shift)
            rest = (seed, threshold, needed, backend)
            torch.library.opcheck(ops.dropout_add_norm_backward.default, (*arguments, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend: str):
    need(backend)
    for dtype in DTYPES:
        leaves = leaves_of((4, 6), dtype, torch.float32)
        call = partial(ours(0.2, backend), *leaves)
        check_autocast_changes_nothing(call, dtype)


def test_compiles_whole():
    layer, norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def f(x: Tensor) -> Tensor:
        y = dropout_add_norm(layer(x), x, norm.weight, norm.bias, dropout=0.1, seed=SEED)
        return y.square().sum()

    leaves = [torch.randn(8, 16, requires_grad=True), *layer.parameters(), *norm.parameters()]
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(leaves[0]), leaves)
    for one, truth in zip(got, torch.autograd.grad(f(leaves[0]), leaves), strict=True):
        torch.testing.assert_close(one, truth, atol=2e-4, rtol=2e-4)
    torch.compile(
        lambda x: dropout_add_norm(x, x + 1, norm.weight, norm.bias, dropout=0.1).sum(),
        fullgraph=True,
    )(leaves[0]).backward()
    assert leaves[0].grad is not None
    assert bool(leaves[0].grad.isfinite().all())


def test_bad_arguments():
    x, residual, weight, bias = leaves_of((3, 4), torch.float32, torch.float32)
    with pytest.raises(UsageError, match=r"residual: expected torch.float32 \[3, 4\]"):
        dropout_add_norm(x, residual[:2], weight, bias)
    with pytest.raises(UsageError, match=r"residual: expected torch.float32 \[3, 4\]"):
        dropout_add_norm(x, residual.double(), weight, bias)
    with pytest.raises(UsageError, match=r"weight: expected floating \[4\]"):
        dropout_add_norm(x, residual, weight[:3], bias)
    with pytest.raises(UsageError, match=r"bias: expected floating \[4\]"):
        dropout_add_norm(x, residual, weight, bias.long())
    with pytest.raises(UsageError, match=r"dropout: expected a probability in \[0, 1\], got 1.5"):
        dropout_add_norm(x, residual, weight, bias, dropout=1.5)
    with pytest.raises(UsageError, match="eps: expected a number >= 0"):
        dropout_add_norm(x, residual, weight, bias, eps=-1.0)
    with pytest.raises(UsageError, match="seed: expected int64"):
        dropout_add_norm(x, residual, weight, bias, dropout=0.1, seed=torch.tensor(1.0))
    with pytest.raises(UsageError, match="native cannot serve this call"):
        dropout_add_norm(x.half(), residual.half(), weight, bias, backend="native")
