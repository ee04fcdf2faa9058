"""The selective linear against its definition: values, gradients, what is saved, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sensikernels._core.errors import UsageError
from sensikernels.layouts import (
    BlockLayout,
    ElementLayout,
    Layout,
    assign_,
    kept_values,
    layout_of,
    to_arguments,
)
from sensikernels.ops.selective_linear import explain, selective_linear
from tests.ops.linear_cases import GRIDS, check_against_definition, make_layout


def inputs(layout: Layout, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, values, bias and an output gradient; weight carries values."""
    out, into = layout.shape
    shapes = ((tokens, into), (out, into), (out,), (tokens, out))
    x, weight, bias, dy = (torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
    values = kept_values(weight, layout).clone()
    return [x.requires_grad_(), weight, values.requires_grad_(), bias.requires_grad_(), dy]


def run(layout: Layout, given: list[Tensor], backend: str, activation: str = "none"):
    """Output and the gradients of x, values and bias."""
    x, weight, values, bias, dy = given
    y = selective_linear(x, weight, values, layout, bias, activation=activation, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, (x, values, bias), dy)]


def check(layout: Layout, given: list[Tensor], backend: str, activation: str = "none") -> None:
    check_against_definition(run, layout, given, backend, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compact", ["", "in", "out", "in out"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_pattern_and_dtype(name: str, compact: str, dtype: torch.dtype):
    layout = make_layout(name, compact=compact)
    for backend in ("auto", "native"):
        check(layout, inputs(layout, 13, dtype), backend, "gelu")


@pytest.mark.parametrize("tokens", [0, 1, 3, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rows", "columns", "cut-blocks"])
def test_every_token_count(name: str, dtype: torch.dtype, tokens: int):
    layout = make_layout(name)
    check(layout, inputs(layout, tokens, dtype), "native")


@pytest.mark.parametrize("keep", ["none", "one", "all"])
@pytest.mark.parametrize("name", GRIDS)
def test_empty_single_and_full_masks(name: str, keep: str):
    layout = make_layout(name, keep, compact="in out")
    check(layout, inputs(layout, 5), "auto")


def test_elements():
    layout = layout_of(torch.rand(9, 7) < 0.4, (1, 1), (9, 7))
    assert isinstance(layout, ElementLayout)
    check(layout, inputs(layout, 5), "auto", "gelu")


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("block", [(1, 6), (8, 1), (3, 2), (1, 1)])
def test_gradients_in_float64(block: tuple[int, int], activation: str):
    """By finite differences of the definition, which moves the weight with the values."""
    size = [-(-n // b) for n, b in zip((8, 6), block, strict=True)]
    layout = layout_of(torch.rand(size) < 0.5, block, (8, 6))
    x, weight, values, bias, _ = inputs(layout, 3, torch.float64)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        moved = weight.clone()
        assign_(moved, values.detach(), layout)
        return selective_linear(x, moved, values, layout, bias, activation=activation)

    assert torch.autograd.gradcheck(call, (x, values, bias))


@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_saves_what_the_kept_entries_need(name: str):
    layout = make_layout(name, compact="in out")
    x, weight, values, bias, dy = inputs(layout, 6)
    saved: list[tuple[int, ...]] = []

    def note(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
    with hooks:
        y = selective_linear(x.detach(), weight, values, layout, bias)
    columns = x.shape[1] if layout.columns is None else layout.columns.shape[0]
    assert saved == [(6, columns)]
    grads = torch.autograd.grad(y, (values, bias), dy)
    assert grads[0].shape == values.shape
    saved.clear()
    with hooks:
        y = selective_linear(x, weight, values.detach(), layout, bias)
    assert (6, x.shape[1]) not in saved
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ weight)


def test_the_weight_never_gets_a_gradient():
    layout = make_layout("rows")
    x, weight, values, bias, dy = inputs(layout, 6)
    weight.requires_grad_()
    for backend in ("auto", "reference"):
        selective_linear(x, weight, values, layout, bias, backend=backend).backward(dy)
        assert weight.grad is None


@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_autocast_follows_linear(name: str):
    layout = make_layout(name)
    x, weight, values, bias, dy = inputs(layout, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_linear(x, weight, values, layout, bias)
        dense = F.linear(x, weight, bias)
    assert torch.equal(y, dense)
    grads = torch.autograd.grad(y, (x, values, bias), dy.bfloat16())
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.parametrize("name", ["rows", "columns", "cut-blocks"])
def test_compiles_without_a_break(name: str):
    layout = make_layout(name, compact="in out")
    x, weight, values, bias, dy = inputs(layout, 6)

    def step(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return selective_linear(x, weight, values, layout, bias, activation="gelu").sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, values, bias), step(x, values, bias)
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y, (x, values, bias), dy)
    for a, b in zip(mine, torch.autograd.grad(expected, (x, values, bias), dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["odd-blocks"])
def test_opcheck(name: str):
    layout = make_layout(name)
    assert isinstance(layout, BlockLayout)
    x, _, _, _, dy = (t.detach() for t in inputs(layout, 6))
    for a in (dy, dy.t().contiguous().t()):
        torch.library.opcheck(
            torch.ops.sensikernels.selective_grad_activation.default,
            (a, torch.randn_like(dy), "native"),
        )
    for a, b in ((dy, x), (dy.t().contiguous().t(), x.t().contiguous().t())):
        torch.library.opcheck(
            torch.ops.sensikernels.selective_grad_values.default,
            (a, b, *to_arguments(layout), "native"),
        )


def test_flops_count_the_kept_entries():
    layout = make_layout("cut-blocks")
    given = inputs(layout, 6)
    with FlopCounterMode(display=False) as counter:
        run(layout, given, "native")
    entries = 2 * layout.shape[0] * layout.shape[1] + layout.kept_entries
    assert counter.get_total_flops() == 2 * 6 * entries


def test_explain_names_choice_and_reason():
    assert explain(make_layout("rows")).form == "compact"
    blocks = explain(make_layout("blocks"))
    assert (blocks.form, blocks.backend) == ("selective", "native")
    assert "break-even" in blocks.reason


def test_refusals_name_argument_expected_and_got():
    layout = make_layout("blocks")
    x, weight, values, bias, _ = (t.detach() for t in inputs(layout, 2))
    cases = [
        (r"x: expected \[\.\.\., 48\]", (x[:, 1:], weight, values, layout, bias), {}),
        (r"weight: expected \[64, 48\]", (x, weight[1:], values, layout, bias), {}),
        ("values: expected", (x, weight, values[1:], layout, bias), {}),
        (r"bias: expected \[64\]", (x, weight, values, layout, bias[1:]), {}),
        ("x: expected dtype", (x.double(), weight, values, layout, bias), {}),
        ("activation: expected", (x, weight, values, layout), {"activation": "relu"}),
        ("backend: expected one of", (x, weight, values, layout), {"backend": "cuda"}),
        (
            "backend: triton cannot serve this call: x is not on a GPU",
            (x, weight, values, layout),
            {"backend": "triton"},
        ),
    ]
    for message, arguments, options in cases:
        with pytest.raises(UsageError, match=message):
            selective_linear(*arguments, **options)
