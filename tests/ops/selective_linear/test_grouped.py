"""Linears that share x, run as one: the same outputs and gradients as alone, fewer saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sensikernels._core.errors import UsageError
from sensikernels.layouts import Layout, kept_values, layout_of, to_arguments
from sensikernels.ops.selective_linear import (
    Selected,
    selective_linear,
    selective_linear_grouped,
)
from sensikernels.ops.selective_linear.grouped import joined
from tests.tolerance import assert_close_to_reference

IN = 40
KINDS = ["rows", "heads", "columns", "blocks", "mixed rows", "other columns"]


def layouts(kind: str) -> list[Layout]:
    torch.manual_seed(1)
    if kind == "columns":
        keep = torch.rand(1, IN) < 0.5
        return [layout_of(keep, (out, 1), (out, IN)) for out in (32, 24, 48)]
    if kind == "blocks":
        grids = [torch.rand(4, 5) < 0.5 for _ in range(3)]
        return [layout_of(grid, (8, 8), (32, IN), compact_output=True) for grid in grids]
    if kind == "other columns":  # of five block columns the second stays out; the last is cut
        grids = [torch.rand(4, 4) < 0.6 for _ in range(3)]
        for grid, read in zip(grids, ([0, 2], [2, 3], [0, 3]), strict=True):
            grid[:, [c for c in range(4) if c not in read]] = False
            grid[0, read] = torch.tensor([True, False])
            grid[1, read] = True
        both = {"compact_input": True, "compact_output": True}
        return [layout_of(grid, (8, 12), (32, IN), **both) for grid in grids]
    band = {"rows": 1, "heads": 8, "mixed rows": 1}[kind]
    keeps = [torch.rand(out // band, 1) < 0.4 for out in (32, 24, 48)]
    if kind == "mixed rows":
        keeps[0][:], keeps[1][:] = True, False
    return [layout_of(k, (band, IN), (len(k) * band, IN)) for k in keeps]


def inputs(kind: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, list[Selected], list]:
    x = torch.randn(tokens, IN, dtype=torch.float64).to(dtype).requires_grad_()
    linears, dys = [], []
    for i, layout in enumerate(layouts(kind)):
        weight = torch.randn(layout.shape, dtype=torch.float64).to(dtype)
        values = kept_values(weight, layout).clone().requires_grad_()
        bias = torch.randn(layout.shape[0], dtype=torch.float64).to(dtype).requires_grad_()
        linears.append(Selected(weight, values, layout, bias if i else None))
        dys.append(torch.randn(tokens, layout.shape[0], dtype=torch.float64).to(dtype))
    return x, linears, dys


def grads(x: Tensor, linears: list[Selected], ys: tuple[Tensor, ...], dys: list) -> list[Tensor]:
    leaves = [x, *(t for one in linears for t in (one.values, one.bias) if t is not None)]
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


def alone(linears: list[Selected], x: Tensor, backend: str = "auto") -> tuple[Tensor, ...]:
    return tuple(selective_linear(x, *one, backend=backend) for one in linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_as_alone(kind: str, tokens: int, dtype: torch.dtype):
    x, linears, dys = inputs(kind, tokens, dtype)
    got = grads(x, linears, selective_linear_grouped(x, linears), dys)
    same = grads(x, linears, alone(linears, x, "reference"), dys)
    wide = x.detach().double().requires_grad_()
    double = [
        Selected(
            *(t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for t in one)
        )
        for one in linears
    ]
    exact = grads(wide, double, alone(double, wide, "reference"), [dy.double() for dy in dys])
    for mine, torchs, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(mine, torchs, truth)


@pytest.mark.parametrize(("kind", "kept"), [("rows", IN), ("columns", None), ("other columns", 28)])
def test_x_is_saved_once_and_of_columns_only_the_kept(kind: str, kept: int | None):
    x, linears, _ = inputs(kind, 6, torch.float32)
    saved: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        selective_linear_grouped(x.detach(), linears)
    columns = linears[0].layout.columns
    assert [t.shape for t in saved] == [(6, len(columns) if kept is None else kept)]


def test_layouts_are_joined_once():
    first, second, third = layouts("other columns")
    made = joined([first, second])
    assert all(a is b for a, b in zip(made, joined([first, second]), strict=True))
    assert made[0].columns is made[1].columns
    assert joined([first, third])[0].columns is not made[0].columns
    assert joined([first])[0] is first
    whole = layout_of(torch.eye(4).bool(), (8, 12), (32, IN))
    for one in joined([first, whole]):
        assert one.columns is None
        assert one.grid_shape[1] == 4
    weight = torch.randn(32, IN)
    for one, other in zip((first, second), made, strict=True):
        assert torch.equal(kept_values(weight, one), kept_values(weight, other))


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks"])
def test_batched_autocast_compiled_and_unused(kind: str):
    x, linears, dys = inputs(kind, 6, torch.float32)
    flat = selective_linear_grouped(x, linears)
    batched = selective_linear_grouped(x.view(2, 3, IN), linears)
    for a, b in zip(flat, batched, strict=True):
        assert torch.equal(a, b.view_as(a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = selective_linear_grouped(x, linears)
        for mine, own in zip(ys, alone(linears, x), strict=True):
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, own)
    only = torch.autograd.grad(selective_linear_grouped(x, linears)[1].sum(), linears[1].values)
    expected = torch.autograd.grad(alone(linears, x)[1].sum(), linears[1].values)
    torch.testing.assert_close(only, expected)

    def step(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        mine = [one._replace(values=v) for one, v in zip(linears, values, strict=True)]
        return tuple(y.sin() for y in selective_linear_grouped(x, mine))

    values = [one.values for one in linears]
    if kind != "columns":  # a graph shares only what is the same index
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        a, b = (torch.autograd.grad(f(x, *values), [x, *values], dys) for f in (compiled, step))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_count_the_kept_entries(kind: str):
    x, linears, dys = inputs(kind, 6, torch.float32)
    with FlopCounterMode(display=False) as counter:
        grads(x, linears, selective_linear_grouped(x, linears), dys)
    entries = sum(2 * one.weight.numel() + one.layout.kept_entries for one in linears)
    assert counter.get_total_flops() == 2 * 6 * entries


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str):
    x, linears, dys = inputs(kind, 6, torch.float32)
    sizes, index = zip(*(to_arguments(one.layout) for one in linears), strict=True)
    flat = sum(map(list, sizes), []), sum(map(list, index), [])
    narrow = [
        dy if one.layout.rows is None else dy[:, one.layout.rows.long()]
        for dy, one in zip(dys, linears, strict=True)
    ]
    read = x.detach()
    if kind == "columns":
        read = read[:, linears[0].layout.columns.long()]
    elif kind == "other columns":
        over = joined([one.layout for one in linears])
        linears = [one._replace(layout=own) for one, own in zip(linears, over, strict=True)]
        read = read[:, over[0].columns.long()]
        sizes, index = zip(*(to_arguments(one) for one in over), strict=True)
        flat = sum(map(list, sizes), []), sum(map(list, index), [])
    torch.library.opcheck(
        torch.ops.sensikernels.selective_grad_values_grouped.default,
        (narrow, read, *flat, "native"),
    )


def test_refusals_name_argument_expected_and_got():
    x, rows, _ = inputs("rows", 4, torch.float32)
    _, columns, _ = inputs("columns", 4, torch.float32)
    _, blocks, _ = inputs("blocks", 4, torch.float32)
    frozen = [rows[0], rows[1]._replace(values=rows[1].values.detach())]
    eye = layout_of(torch.eye(IN).bool(), (1, 1), (IN, IN))
    element = Selected(torch.zeros(IN, IN), torch.zeros(IN).requires_grad_(), eye)
    for given, message in [
        ([], "there are none"),
        (rows + rows, "at most 3 linears"),
        ([rows[0], columns[0]], "they keep different columns"),
        ([rows[0], blocks[0]], "not by elements or a mixture"),
        ([element], "not by elements or a mixture"),
        (frozen, "values: expected ones that are trained"),
    ]:
        with pytest.raises(UsageError, match=message):
            selective_linear_grouped(x, given)
    with pytest.raises(UsageError, match="x: expected"):
        selective_linear_grouped(x[:, 1:], rows)
    with pytest.raises(
        UsageError, match="backend: triton cannot serve this call: x is not on a GPU"
    ):
        selective_linear_grouped(x, rows, backend="triton")
    with pytest.raises(UsageError, match="backend: expected one of auto, native, triton"):
        selective_linear_grouped(x, rows, backend="reference")
