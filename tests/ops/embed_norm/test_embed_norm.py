"""Embeddings, LayerNorm and dropout in one: as good as PyTorch's parts, sparse where asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.dropout import dropout
from sensikernels.ops.embed_norm import embed_norm, explain
from sensikernels.optim import SubsetAdamW
from tests.ops.agreement import check_autocast_changes_nothing, check_same_bits_on_any_threads
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16]
SEED = torch.tensor(2**40 + 12345)
NAMES = ["word", "position", "token_type", "weight", "bias"]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def case(
    shape: tuple[int, ...], hidden: int, dtype: torch.dtype, affine: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Ids, and tables with weight and bias. Many tokens share a word."""
    sizes = (37, 11, 2)
    ids = [torch.randint(size, shape) for size in sizes]
    tables = [torch.randn(size, hidden).to(dtype) for size in sizes]
    norm = [(torch.rand(hidden) + 0.5).to(affine), torch.randn(hidden).to(affine)]
    return ids, [*tables, *norm]


def run(
    f: Callable[..., Tensor], ids: list[Tensor], leaves: list[Tensor], dy: Tensor
) -> list[Tensor]:
    """Output and gradients, dense."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = f(*ids, *leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    return [y, *(g.to_dense() if g.is_sparse else g for g in grads)]


def parts(p: float) -> Callable[..., Tensor]:
    """The composition, with the same mask."""

    def f(i: Tensor, j: Tensor, k: Tensor, *leaves: Tensor) -> Tensor:
        word, position, kind, weight, bias = leaves
        z = F.embedding(i, word) + F.embedding(j, position) + F.embedding(k, kind)
        y = F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), 1e-12)
        return dropout(y, p, seed=SEED, backend="reference")

    return f


def ours(p: float, backend: str = "auto", *, sparse: bool = False) -> Callable[..., Tensor]:
    named = {"dropout": p, "seed": SEED, "backend": backend, "sparse": sparse}
    return lambda *a: embed_norm(*a, **named)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 7), (300,)], ids=str)
@pytest.mark.parametrize("hidden", [17, 100, 384])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_as_good_as_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], hidden: int, p: float
):
    need(backend)
    ids, leaves = case(shape, hidden, dtype, dtype)
    dy = torch.randn(*shape, hidden).to(dtype)
    same, exact = (
        run(parts(p), ids, [t.to(d) for t in leaves], dy.to(d)) for d in (dtype, torch.float64)
    )
    for sparse in (False, True):
        got = run(ours(p, backend, sparse=sparse), ids, leaves, dy)
        for one, torch_own, truth in zip(got, same, exact, strict=True):
            assert_close_to_reference(one, torch_own, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_gradient_is_that_of_an_embedding(backend: str, dtype: torch.dtype):
    """Entry for entry, so that a row-sparse optimizer takes it."""
    need(backend)
    ids, leaves = case((3, 8), 24, dtype)
    got, truth = (leaves[0].clone().requires_grad_() for _ in range(2))
    dy = torch.randn(3, 8, 24).to(dtype)
    ours(0.2, backend, sparse=True)(*ids, got, *leaves[1:]).backward(dy)
    F.embedding(ids[0], truth, sparse=True).backward(dy)
    assert got.grad is not None
    assert truth.grad is not None
    assert got.grad.is_sparse
    assert got.grad.dtype == dtype
    assert got.grad.is_coalesced() == truth.grad.is_coalesced()
    assert torch.equal(got.grad._indices(), truth.grad._indices())
    assert got.grad._values().shape == truth.grad._values().shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_optimizer_takes_it(backend: str):
    need(backend)
    ids, leaves = case((50,), 24, torch.float32)
    after = []
    for sparse in (True, False):
        word = leaves[0].clone().requires_grad_()
        optimizer = SubsetAdamW([word], lr=0.1, weight_decay=0.0)
        ours(0.0, backend, sparse=sparse)(*ids, word, *leaves[1:]).square().sum().backward()
        optimizer.step()
        after.append(word.detach())
    touched = ids[0].unique()
    torch.testing.assert_close(after[0][touched], after[1][touched], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(5))
def test_only_what_needs_a_gradient(backend: str, which: int):
    need(backend)
    ids, leaves = case((9,), 24, torch.float32)
    leaves[which].requires_grad_()
    (got,) = torch.autograd.grad(ours(0.3, backend)(*ids, *leaves).square().sum(), leaves[which])
    (truth,) = torch.autograd.grad(parts(0.3)(*ids, *leaves).square().sum(), leaves[which])
    torch.testing.assert_close(got, truth, atol=1e-4, rtol=1e-4)


def test_frozen_tables_cost_nothing(monkeypatch: pytest.MonkeyPatch):
    need("native")
    from sensikernels.ops.embed_norm import native

    ids, leaves = case((9,), 24, torch.float32)
    counts: list[int] = []
    inner = native.add_rows
    monkeypatch.setattr(
        native, "add_rows", lambda rows, i, count: counts.append(count) or inner(rows, i, count)
    )
    leaves[1].requires_grad_()
    ours(0.3, "native")(*ids, *leaves).sum().backward()
    assert counts == [leaves[1].shape[0]]


def test_one_and_two_threads_sum_alike():
    need("native")
    ids, leaves = case((5000,), 96, torch.float32)
    dy = torch.randn(5000, 96)
    check_same_bits_on_any_threads(lambda: run(ours(0.1), ids, leaves, dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend: str):
    need(backend)
    ids, leaves = case((6, 8), 20, torch.float32)
    ids[0], ids[1] = ids[0].t().contiguous().t(), torch.arange(8).expand(6, 8)
    leaves[0] = torch.randn(20, 37).t()
    dy = torch.randn(1, 1, 20).expand(6, 8, 20)
    for one, truth in zip(
        run(ours(0.3, backend), ids, leaves, dy), run(parts(0.3), ids, leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, truth, atol=2e-5, rtol=2e-5)


def test_seed_from_torch():
    ids, leaves = case((30,), 64, torch.float32)
    torch.manual_seed(5)
    first, second = (embed_norm(*ids, *leaves, dropout=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, embed_norm(*ids, *leaves, dropout=0.5))
    assert not torch.equal(first, second)


def test_gradients_of_gradients():
    ids, leaves = case((4,), 6, torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in leaves]
    assert explain(leaves[0]).backend == "reference"
    f = lambda *leaves: ours(0.4)(*ids, *leaves)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["whole", "dropout"])
def test_operator_checks(backend: str, dtype: torch.dtype, seed: Tensor | None):
    need(backend)
    ops = torch.ops.sensikernels
    ids, (*tables, weight, bias) = case((2, 6), 8, dtype)
    threshold = 65536 if seed is None else 60_000
    arguments = (ids, tables, weight, bias, seed, threshold, 1e-12, backend)
    torch.library.opcheck(ops.embed_norm.default, arguments)
    y, moments = ops.embed_norm(*arguments)
    for needed in (True, False):
        backward = (y, ids, tables, moments, weight, seed, threshold, needed, backend)
        torch.library.opcheck(ops.embed_norm_backward.default, backward)
    torch.library.opcheck(ops.add_rows.default, (y.view(12, 8), ids[0], 37, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend: str):
    need(backend)
    for dtype in DTYPES:
        ids, leaves = case((4, 6), 16, dtype)
        call = partial(ours(0.2, backend), *ids, *leaves)
        check_autocast_changes_nothing(call, dtype)


def test_compiles_whole():
    ids, leaves = case((4, 6), 16, torch.float32)
    leaves = [t.requires_grad_() for t in leaves]
    f = lambda *leaves: ours(0.1)(*ids, *leaves).square().sum()  # noqa: E731
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*leaves), leaves)
    for one, truth in zip(got, torch.autograd.grad(f(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, truth, atol=1e-4, rtol=1e-4)


def test_bad_arguments():
    ids, leaves = case((3,), 4, torch.float32)
    word, position, kind, weight, bias = leaves
    with pytest.raises(UsageError, match=r"word: expected floating \[V, hidden\]"):
        embed_norm(*ids, word[0], position, kind, weight, bias)
    with pytest.raises(UsageError, match=r"position: expected torch.float32 \[n, 4\]"):
        embed_norm(*ids, word, position[:, :3], kind, weight, bias)
    with pytest.raises(UsageError, match=r"weight: expected floating \[4\]"):
        embed_norm(*ids, *leaves[:3], weight[:3], bias)
    with pytest.raises(UsageError, match=r"position_ids: expected int64 \[3\]"):
        embed_norm(ids[0], ids[1][:2], ids[2], *leaves)
    with pytest.raises(UsageError, match=r"token_type_ids: expected ids in \[0, 2\), got ids"):
        embed_norm(ids[0], ids[1], torch.tensor([0, 1, 2]), *leaves)
    with pytest.raises(UsageError, match=r"dropout: expected a probability"):
        embed_norm(*ids, *leaves, dropout=-0.1)
    with pytest.raises(UsageError, match="seed: expected int64"):
        embed_norm(*ids, *leaves, dropout=0.1, seed=torch.tensor(1.0))
    with pytest.raises(UsageError, match="native cannot serve this call"):
        embed_norm(*ids, *(t.half() for t in leaves), backend="native")
