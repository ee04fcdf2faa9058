"""Exact GELU with a bias: as good as PyTorch's, one order of sums, clear errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.bias_gelu import bias_gelu, explain
from tests.ops.agreement import (
    check_autocast_changes_nothing,
    check_compiles_whole,
    check_same_bits_on_any_threads,
)
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 8), (1, 1), (3, 5), (17, 48), (2, 9, 100), (130, 384), (7,)]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def run(f, x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias) if t is not None]
    y = f(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def torchs(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", ["none", "same", "float32"])
def test_as_good_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...], biased: str):
    need(backend)
    x, dy = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    bias = None if biased == "none" else torch.randn(shape[-1])
    bias = bias.to(dtype) if biased == "same" and bias is not None else bias
    got = run(lambda *a: bias_gelu(*a, backend=backend), x, bias, dy)
    same = run(torchs, x, bias, dy)
    wide = None if bias is None else bias.double()
    exact = run(torchs, x.double(), wide, dy.double())
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(one, torch_own.to(one.dtype), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everywhere_on_the_line(backend: str):
    """Exact tails, and NaN stays NaN, forward and backward."""
    need(backend)
    x = torch.linspace(-12, 12, 200_001)
    got = run(lambda x: bias_gelu(x, backend=backend), x, None, torch.ones_like(x))
    exact = run(F.gelu, x.double(), None, torch.ones_like(x).double())
    for one, truth in zip(got, exact, strict=True):
        assert float((one.detach() - truth.detach()).abs().max()) < 1.2e-6
    x = torch.tensor([-1e30, -40.0, 0.0, 40.0, 1e30, float("nan")])
    y, dx = run(lambda x: bias_gelu(x, backend=backend), x, None, torch.ones_like(x))
    assert y.nan_to_num(7.0).tolist() == [0, 0, 0, 40, x[4].item(), 7]
    torch.testing.assert_close(dx[:5], torch.tensor([0, 0, 0.5, 1, 1]), atol=1e-7, rtol=0)
    assert dx[5:].isnan().all()


def test_one_and_two_threads_sum_alike():
    need("native")
    x, bias, dy = torch.randn(5000, 96), torch.randn(96), torch.randn(5000, 96)
    check_same_bits_on_any_threads(lambda: run(bias_gelu, x, bias, dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend: str):
    need(backend)
    x, bias = torch.randn(8, 6, 10).permute(2, 0, 1), torch.randn(12)[::2]
    dy = torch.randn(1, 1, 6).expand(10, 8, 6)
    got = run(lambda *a: bias_gelu(*a, backend=backend), x, bias, dy)
    for one, truth in zip(got, run(torchs, x, bias, dy), strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient(backend: str):
    need(backend)
    x, bias = torch.randn(5, 6), torch.randn(6)
    for mine in (x, bias):
        leaf = mine.clone().requires_grad_()
        pair = (leaf, bias) if mine is x else (x, leaf)
        (got,) = torch.autograd.grad(bias_gelu(*pair, backend=backend).sum(), leaf)
        (truth,) = torch.autograd.grad(torchs(*pair).sum(), leaf)
        torch.testing.assert_close(got, truth)


def test_saves_x_alone():
    need("native")
    x = torch.randn(4, 6, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_gelu(x, torch.randn(6))
    assert sum(t.numel() for t in saved) == x.numel() + 6


def test_gradients_of_gradients():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert explain(x).backend == "reference"
    assert torch.autograd.gradcheck(bias_gelu, (x, bias))
    assert torch.autograd.gradgradcheck(bias_gelu, (x, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_checks(backend: str, dtype: torch.dtype):
    need(backend)
    x, dy = torch.randn(2, 6, 8).to(dtype), torch.randn(2, 6, 8).to(dtype)
    for bias in (None, torch.randn(8)):
        torch.library.opcheck(torch.ops.sensikernels.bias_gelu.default, (x, bias, backend))
        for needed in (True, False):
            arguments = (dy, x, bias, needed, backend)
            torch.library.opcheck(torch.ops.sensikernels.bias_gelu_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend: str):
    need(backend)
    x, bias = torch.randn(4, 6), torch.randn(6)
    for dtype in DTYPES:
        check_autocast_changes_nothing(
            partial(bias_gelu, x.to(dtype), bias, backend=backend), dtype
        )


def test_compiles_whole():
    layer = nn.Linear(16, 32)
    f = lambda x: bias_gelu(F.linear(x, layer.weight), layer.bias).sum()  # noqa: E731
    check_compiles_whole(f, layer, torch.randn(8, 16))


def test_bad_arguments():
    x = torch.randn(3, 4)
    for wrong in (torch.ones(3, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(UsageError, match=r"x: expected floating \[..., width\], got torch"):
            bias_gelu(wrong)
    for wrong in (torch.randn(3), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(UsageError, match=r"bias: expected floating \[4\] on cpu, got torch"):
            bias_gelu(x, wrong)
    with pytest.raises(UsageError, match="native cannot serve this call"):
        bias_gelu(x.half(), backend="native")
    with pytest.raises(UsageError, match="triton cannot serve"):
        bias_gelu(x, backend="triton")
