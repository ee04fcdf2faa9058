"""Backward from the output instead of the sum: as precise, never a tensor more, and watched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.dropout_add_norm import dropout_add_norm
from sensikernels.ops.dropout_add_norm.native import recovers
from tests.ops.dropout_add_norm.cases import DTYPES, SEED, parts, run
from tests.tolerance import assert_close_to_reference

pytestmark = pytest.mark.skipif(not extension.available(), reason="no compiled extension")
ROWS, HIDDEN = 130, 384


def check(weight: Tensor, bias: Tensor, dtype: torch.dtype, recover: str, p: float = 0.1) -> None:
    rows = [torch.randn(ROWS, HIDDEN).to(dtype) for _ in range(2)]
    leaves = [*rows, weight.to(dtype), bias.to(dtype)]
    dy = torch.randn(ROWS, HIDDEN).to(dtype)
    got = run(lambda *a: dropout_add_norm(*a, dropout=p, seed=SEED, recover=recover), leaves, dy)
    same = run(parts(p), leaves, dy)
    exact = run(parts(p), [t.double() for t in leaves], dy.double())
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(one, torch_own, truth)


def weights(kind: str) -> tuple[Tensor, Tensor]:
    weight, bias = torch.rand(HIDDEN) + 0.5, 0.3 * torch.randn(HIDDEN)
    if kind == "largest bias":
        bias = 2 * weight * torch.randn(HIDDEN).sign()
    elif kind == "small":
        weight, bias = weight * 1e-12, bias * 1e-12
    elif kind == "mixed sizes":
        sizes = 10.0 ** torch.randint(-6, 3, (HIDDEN,))
        weight, bias = weight * sizes, bias * sizes
    elif kind == "a weight near 0":
        weight[7] = 4.8e-33
    elif kind == "a weight of 0":
        weight[7] = 0.0
    elif kind == "large bias":
        bias = bias * 100
    return weight, bias


def saved(recover: str, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The tensors that one call saves for backward, the output last."""
    leaves = [torch.randn(4, HIDDEN) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (*leaves, weight.clone(), bias.clone())]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout_add_norm(*leaves, recover=recover)
    return [*kept, y]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["usual", "largest bias", "small", "mixed sizes"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_output_is_as_good_as_the_sum(kind: str, dtype: torch.dtype, p: float):
    weight, bias = weights(kind)
    # A dtype's rounding may lift a bias over its bound.
    bias = bias * (1 - 2 * torch.finfo(dtype).eps)
    assert recovers(weight.to(dtype), bias.to(dtype))
    check(weight, bias, dtype, "output", p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["a weight near 0", "a weight of 0", "large bias"])
def test_auto_saves_the_sum_where_the_output_forgets(kind: str, dtype: torch.dtype):
    weight, bias = weights(kind)
    assert not recovers(weight.to(dtype), bias.to(dtype))
    check(weight, bias, dtype, "auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_a_pretrained_encoder(dtype: torch.dtype):
    """All but the last layer's output norm (one weight of 5e-33) recover, as precisely."""
    pytest.importorskip("transformers")
    from sensikernels.data import embedded_model_path
    from sensikernels.hf import load_model, quiet

    with quiet():
        layers = load_model(embedded_model_path(), labels=2).bert.encoder.layer
    norms = [
        norm for one in layers for norm in (one.attention.output.LayerNorm, one.output.LayerNorm)
    ]
    found = [recovers(norm.weight.to(dtype), norm.bias.to(dtype)) for norm in norms]
    assert found == [True] * (len(norms) - 1) + [False]
    for norm in norms:
        check(norm.weight.detach(), norm.bias.detach(), dtype, "auto")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_recovers_nothing(number: float):
    weight, bias = weights("usual")
    for odd in (weight, bias):
        before, odd[3] = float(odd[3]), number
        assert not recovers(weight, bias)
        odd[3] = before


def test_saves_the_output_and_no_copy():
    *kept, y = saved("auto", *weights("usual"))
    large = [t for t in kept if t.numel() == y.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == y.data_ptr()


@pytest.mark.parametrize(("recover", "kind"), [("sum", "usual"), ("auto", "large bias")])
def test_saves_the_sum(recover: str, kind: str):
    *kept, y = saved(recover, *weights(kind))
    large = [t for t in kept if t.numel() == y.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() != y.data_ptr()


def test_a_changed_output_is_noticed():
    leaves = [torch.randn(4, HIDDEN), torch.randn(4, HIDDEN), *weights("usual")]
    y = dropout_add_norm(*[t.requires_grad_() for t in leaves])
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("recover", ["auto", "output"])
def test_compiles_whole(recover: str):
    leaves = [torch.randn(8, HIDDEN), torch.randn(8, HIDDEN), *weights("usual")]
    leaves = [t.requires_grad_() for t in leaves]

    def f(*leaves: Tensor) -> Tensor:
        y = dropout_add_norm(*leaves, dropout=0.1, seed=SEED, recover=recover)
        return y.square().sum()

    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*leaves), leaves)
    for one, truth in zip(got, torch.autograd.grad(f(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, truth, atol=2e-4, rtol=2e-4)


def test_named_wrong():
    x = torch.randn(2, 4)
    with pytest.raises(UsageError, match="recover: expected one of auto, output, sum"):
        dropout_add_norm(x, x, x[0], x[1], recover="input")
