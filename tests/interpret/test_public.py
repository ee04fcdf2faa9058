"""The public functions with ``backend="triton"``: outputs and all gradients through autograd."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from sensikernels.layouts import Layout, assign_, kept_values, layout_of
from tests import kernel_checks as checks
from tests.tolerance import assert_close_to_reference

pytestmark = pytest.mark.interpret


def _layout(kind: str) -> Layout:
    if kind == "blocks":
        return checks.blocks("random", (32, 32), (96, 128), "cpu")
    if kind == "compact":
        return checks.blocks("ragged", (32, 32), (96, 128), "cpu", compact=True)
    return checks.compact(kind, (96, 128), "cpu")


@pytest.mark.parametrize("kind", ["blocks", "compact", "rows", "columns", "heads"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_masked_linear(kind: str, activation: str):
    from sensikernels.ops.masked_linear.api import masked_linear

    layout = _layout(kind)
    x = torch.randn(2, 3, layout.in_width)
    values = kept_values(torch.randn(layout.shape), layout)
    bias, dy = torch.randn(layout.out_width), torch.randn(2, 3, layout.out_width)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, values, bias)]
        y = masked_linear(
            leaves[0], leaves[1], layout, leaves[2], activation=activation, backend=backend
        )
        y.backward(dy.to(dtype))
        return [y, *(leaf.grad for leaf in leaves)]

    truths = run("reference", torch.float32), run("reference", torch.float64)
    for mine, same, exact in zip(run("triton", torch.float32), *truths, strict=True):
        assert_close_to_reference(mine, same, exact)


@pytest.mark.parametrize("kind", ["blocks", "compact", "rows", "columns", "heads"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_selective_linear(kind: str, activation: str):
    from sensikernels.ops.selective_linear.api import selective_linear

    layout = _layout(kind)
    x, weight, bias = torch.randn(2, 3, 128), torch.randn(96, 128), torch.randn(96)
    dy = torch.randn(2, 3, 96)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        w = weight.to(dtype, copy=True)
        values = kept_values(w, layout)
        assign_(w, values, layout)
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, values, bias)]
        y = selective_linear(
            leaves[0], w, leaves[1], layout, leaves[2], activation=activation, backend=backend
        )
        y.backward(dy.to(dtype))
        return [y, *(leaf.grad for leaf in leaves)]

    truths = run("reference", torch.float32), run("reference", torch.float64)
    for mine, same, exact in zip(run("triton", torch.float32), *truths, strict=True):
        assert_close_to_reference(mine, same, exact)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("op", ["masked_linear", "selective_linear"])
def test_on_a_gpu_a_compact_layer_takes_gelu_and_bias_in_one_pass(
    monkeypatch: pytest.MonkeyPatch, op: str, kind: str
):
    """What a CUDA tensor runs, with the answer to "is it one" turned round."""
    autograd = import_module(f"sensikernels.ops.{op}.autograd")
    asked: list[torch.Tensor] = []
    layout = _layout(kind)
    weight = torch.randn(layout.shape)
    values, frozen = kept_values(weight, layout), () if op == "masked_linear" else (weight,)
    leaves = [t.requires_grad_() for t in (torch.randn(6, 128), values.clone(), torch.randn(96))]
    dy = torch.randn(6, 96)
    linear = getattr(import_module(f"sensikernels.ops.{op}.api"), op)

    def grads() -> tuple[torch.Tensor, ...]:
        x, mine, bias = leaves
        y = linear(x, *frozen, mine, layout, bias, activation="gelu", backend="native")
        return torch.autograd.grad(y, leaves, dy)

    expected = grads()
    monkeypatch.setattr(autograd, "fused_activation", lambda t: asked.append(t) or True)
    for got, same in zip(grads(), expected, strict=True):
        torch.testing.assert_close(got, same, atol=1e-5, rtol=1e-5)
    assert len(asked) == 1


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("kind", ["blocks", "compact", "rows", "columns"])
def test_on_a_gpu_a_mask_change_is_one_launch(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int
):
    from sensikernels.ops.common import triton_gather
    from sensikernels.ops.masked_linear import take_kept

    launches: list[int] = []
    launch = triton_gather.take_kept

    def counted(tensors: list[torch.Tensor], *rest: object) -> list[torch.Tensor]:
        launches.append(len(tensors))
        return launch(tensors, *rest)

    monkeypatch.setitem(take_kept.__globals__, "fused_activation", lambda t: True)
    monkeypatch.setattr(triton_gather, "take_kept", counted)
    layout = _layout(kind)
    tensors = [torch.randn(layout.shape) for _ in range(count)]
    for got, source in zip(take_kept(tensors, layout), tensors, strict=True):
        assert torch.equal(got, kept_values(source, layout))
    assert launches == [min(count, 4)] + [1] * (count > 4)


@pytest.mark.parametrize("kind", ["rows", "blocks"])
def test_linears_that_share_x(kind: str):
    from sensikernels.ops.selective_linear import Selected, selective_linear_grouped

    layouts = [_layout(kind) for _ in range(3)]
    x = torch.randn(2, 3, 128, requires_grad=True)
    linears = []
    for layout in layouts:
        weight = torch.randn(96, 128)
        values = kept_values(weight, layout).clone().requires_grad_()
        linears.append(Selected(weight, values, layout, torch.randn(96, requires_grad=True)))
    leaves = [x, *(t for one in linears for t in (one.values, one.bias))]
    dys = list(torch.randn(3, 2, 3, 96))

    def grads(backend: str) -> tuple[torch.Tensor, ...]:
        ys = selective_linear_grouped(x, linears, backend=backend)
        return torch.autograd.grad(ys, leaves, dys)

    for got, same in zip(grads("triton"), grads("native"), strict=True):
        torch.testing.assert_close(got, same, atol=1e-5, rtol=1e-5)


def test_single_elements_have_no_kernel():
    from sensikernels._core.errors import UsageError
    from sensikernels.ops.masked_linear.api import masked_linear

    layout = layout_of(torch.eye(8, dtype=torch.bool), (1, 1), (8, 8))
    with pytest.raises(UsageError, match="backend"):
        masked_linear(torch.ones(2, 8), torch.ones(8), layout, backend="triton")
