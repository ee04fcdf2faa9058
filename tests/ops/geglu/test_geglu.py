"""The gated GELU: as good as PyTorch's parts, one order of sums, clear errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.bias_gelu import bias_gelu
from sensikernels.ops.geglu import explain, geglu
from tests.ops.agreement import (
    check_autocast_changes_nothing,
    check_compiles_whole,
    check_same_bits_on_any_threads,
)
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 8), (5, 0), (1, 2), (3, 10), (17, 96), (2, 9, 100), (130, 384), (14,)]
HUGE = [((100_003, 2), "none"), ((2, 200_006), "float32")]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def run(f, x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias) if t is not None]
    y = f(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def torchs(x: Tensor, bias: Tensor | None = None) -> Tensor:
    z = x if bias is None else x + bias.to(x.dtype)
    n = x.shape[-1] // 2
    return F.gelu(z[..., :n]) * z[..., n:]


def half(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2)


def check(backend: str, dtype: torch.dtype, shape: tuple[int, ...], biased: str) -> None:
    """As good as PyTorch's parts in the same dtype."""
    x, dy = (torch.randn(shape) * 2).to(dtype), torch.randn(half(shape)).to(dtype)
    bias = None if biased == "none" else torch.randn(shape[-1])
    bias = bias.to(dtype) if biased == "same" and bias is not None else bias
    got = run(lambda *a: geglu(*a, backend=backend), x, bias, dy)
    same = run(torchs, x, bias, dy)
    wide = None if bias is None else bias.double()
    exact = run(torchs, x.double(), wide, dy.double())
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert one.is_contiguous()
        assert_close_to_reference(one, torch_own.to(one.dtype), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", ["none", "same", "float32"])
def test_as_good_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...], biased: str):
    need(backend)
    check(backend, dtype, shape, biased)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "biased"), HUGE, ids=str)
def test_long_and_wide(dtype: torch.dtype, shape: tuple[int, ...], biased: str):
    need("native")
    check("native", dtype, shape, biased)


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 70).map(lambda n: 2 * n)),
    dtype=st.sampled_from(DTYPES),
    biased=st.sampled_from(["none", "same", "float32"]),
)
@settings(max_examples=40)
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype, biased: str):
    need("native")
    check("native", dtype, shape, biased)


@given(n=st.integers(1, 40), rows=st.integers(1, 20), factor=st.sampled_from([-4.0, 0.5, 2.0]))
@settings(max_examples=40)
def test_linear_in_the_gate(n: int, rows: int, factor: float):
    """A gate times a power of two: the result times it, to the bit. A gate of 1: GELU."""
    need("native")
    a, b = torch.randn(rows, n), torch.randn(rows, n)
    one, other = (geglu(torch.cat([a, gate], 1)) for gate in (b, factor * b))
    assert torch.equal(factor * one, other)
    ones = geglu(torch.cat([a, torch.ones_like(b)], 1))
    torch.testing.assert_close(ones, bias_gelu(a), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everywhere_on_the_line(backend: str):
    """Exact tails, and NaN stays NaN, forward and backward."""
    need(backend)
    a = torch.linspace(-12, 12, 100_001)[:, None]
    x = torch.cat([a, torch.ones_like(a)], 1)
    got = run(lambda x: geglu(x, backend=backend), x, None, torch.ones_like(a))
    exact = run(torchs, x.double(), None, torch.ones_like(a).double())
    for one, truth in zip(got, exact, strict=True):
        assert float((one.detach() - truth.detach()).abs().max()) < 1.2e-6
    x = torch.tensor([[-40.0, 3.0], [40.0, 3.0], [float("nan"), 1.0], [1.0, float("nan")]])
    y, dx = run(lambda x: geglu(x, backend=backend), x, None, torch.ones(4, 1))
    assert y.nan_to_num(7.0).flatten().tolist() == [0, 120, 7, 7]
    assert dx.isnan().tolist() == [[False, False], [False, False], [True, True], [True, False]]


def test_modernberts_mlp():
    """The first half is what transformers activates."""
    mlp = ModernBertMLP(ModernBertConfig(hidden_size=16, intermediate_size=24, mlp_dropout=0.0))
    hidden = torch.randn(5, 16)
    torch.testing.assert_close(mlp.Wo(geglu(mlp.Wi(hidden))), mlp(hidden))


def test_one_and_two_threads_sum_alike():
    need("native")
    for dtype in DTYPES:
        x, dy = torch.randn(5000, 96).to(dtype), torch.randn(5000, 48).to(dtype)
        check_same_bits_on_any_threads(lambda: run(geglu, x, torch.full((96,), 0.3), dy))  # noqa: B023


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend: str):
    need(backend)
    x, bias = torch.randn(8, 6, 10).permute(2, 0, 1), torch.randn(12)[::2]
    dy = torch.randn(1, 1, 3).expand(10, 8, 3)
    got = run(lambda *a: geglu(*a, backend=backend), x, bias, dy)
    for one, truth in zip(got, run(torchs, x, bias, dy), strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient(backend: str):
    need(backend)
    x, bias = torch.randn(5, 6), torch.randn(6)
    for mine in (x, bias):
        leaf = mine.clone().requires_grad_()
        pair = (leaf, bias) if mine is x else (x, leaf)
        (got,) = torch.autograd.grad(geglu(*pair, backend=backend).sum(), leaf)
        (truth,) = torch.autograd.grad(torchs(*pair).sum(), leaf)
        torch.testing.assert_close(got, truth)


def test_saves_x_alone():
    need("native")
    x = torch.randn(4, 6, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        geglu(x, torch.randn(6))
    assert sum(t.numel() for t in saved) == x.numel() + 6


def test_gradients_of_gradients():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert explain(x).backend == "reference"
    assert torch.autograd.gradcheck(geglu, (x, bias))
    assert torch.autograd.gradgradcheck(geglu, (x, bias))


def test_the_backward_operator_is_the_definitions_gradient():
    x, bias = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    dy = torch.randn(5, 4, dtype=torch.float64)
    got = torch.ops.sensikernels.geglu_backward(dy, x, bias, True, "reference")
    for one, truth in zip(got, run(geglu, x, bias, dy)[1:], strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_checks(backend: str, dtype: torch.dtype):
    need(backend)
    x, dy = torch.randn(2, 6, 8).to(dtype), torch.randn(2, 6, 4).to(dtype)
    for bias in (None, torch.randn(8)):
        torch.library.opcheck(torch.ops.sensikernels.geglu.default, (x, bias, backend))
        for needed in (True, False):
            arguments = (dy, x, bias, needed, backend)
            torch.library.opcheck(torch.ops.sensikernels.geglu_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend: str):
    need(backend)
    x, bias = torch.randn(4, 6), torch.randn(6)
    for dtype in DTYPES:
        check_autocast_changes_nothing(partial(geglu, x.to(dtype), bias, backend=backend), dtype)


def test_compiles_whole():
    layer = nn.Linear(16, 32)
    f = lambda x: geglu(F.linear(x, layer.weight), layer.bias).sum()  # noqa: E731
    check_compiles_whole(f, layer, torch.randn(8, 16))


def test_bad_arguments():
    x = torch.randn(3, 4)
    for wrong in (torch.ones(4, dtype=torch.int64), torch.tensor(1.0), torch.randn(2, 5)):
        with pytest.raises(UsageError, match=r"x: expected floating \[..., 2 n\], got torch"):
            geglu(wrong)
    for wrong in (torch.randn(2), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(UsageError, match=r"bias: expected floating \[4\] on cpu, got torch"):
            geglu(x, wrong)
    with pytest.raises(UsageError, match="native cannot serve this call"):
        geglu(x.half(), backend="native")
    with pytest.raises(UsageError, match="triton cannot serve"):
        geglu(x, backend="triton")
