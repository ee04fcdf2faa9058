"""The masked linear against its definition: values, gradients, laws and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.layouts import (
    BlockLayout,
    Layout,
    full_weight,
    kept_values,
    layout_of,
    to_arguments,
)
from sensikernels.ops.masked_linear import explain, masked_linear
from tests.ops.linear_cases import GRIDS, check_against_definition, make_layout


def inputs(layout: Layout, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, values, bias and an output gradient, in float64 rounded to ``dtype``."""
    shapes = (
        (tokens, layout.in_width),
        layout.values_shape,
        (layout.out_width,),
        (tokens, layout.out_width),
    )
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors[1] = kept_values(
        full_weight(tensors[1], layout), layout
    )  # padding of cut blocks is zero
    return [t.requires_grad_() for t in tensors[:3]] + tensors[3:]


def run(layout: Layout, given: list[Tensor], backend: str, activation: str = "none"):
    """Output and the three gradients."""
    *leaves, dy = given
    y = masked_linear(
        leaves[0], leaves[1], layout, leaves[2], activation=activation, backend=backend
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(layout: Layout, given: list[Tensor], backend: str, activation: str = "none") -> None:
    check_against_definition(run, layout, given, backend, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compact", ["", "in", "out", "in out"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_pattern_and_dtype(name: str, compact: str, dtype: torch.dtype):
    layout = make_layout(name, compact=compact)
    check(layout, inputs(layout, 13, dtype), "native", "gelu")


@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 9, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rows", "columns", "cut-blocks", "odd-blocks"])
def test_every_token_count(name: str, dtype: torch.dtype, tokens: int):
    layout = make_layout(name)
    check(layout, inputs(layout, tokens, dtype), "native")


@pytest.mark.parametrize("keep", ["none", "one", "all"])
@pytest.mark.parametrize("compact", ["", "in out"])
@pytest.mark.parametrize("name", GRIDS)
def test_empty_single_and_full_masks(name: str, compact: str, keep: str):
    layout = make_layout(name, keep, compact=compact)
    check(layout, inputs(layout, 5), "native", "gelu")
    check(layout, inputs(layout, 5), "auto")


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("block", [(1, 6), (8, 1), (3, 6), (3, 2), (4, 4), (1, 1)])
def test_gradcheck(block: tuple[int, int], activation: str):
    size = [-(-n // b) for n, b in zip((8, 6), block, strict=True)]
    layout = layout_of(torch.rand(size) < 0.5, block, (8, 6))
    x, values, bias, _ = inputs(layout, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *a: masked_linear(a[0], a[1], layout, a[2], activation=activation),
        (x.detach().view(1, 3, -1).requires_grad_(), values, bias),
    )


def test_full_output_keeps_the_bias_of_dropped_rows():
    layout = make_layout("rows", "none")
    x, values, bias, _ = inputs(layout, 4)
    assert torch.equal(masked_linear(x, values, layout, bias), bias.expand(4, -1))
    gelu = masked_linear(x, values, layout, bias, activation="gelu")
    assert torch.equal(gelu, F.gelu(bias).expand(4, -1))


def test_a_huge_padding_neighbour_does_not_leak():
    """Blocks next to a NaN input column that they do not read stay clean."""
    layout = layout_of(torch.tensor([[True, False], [False, True]]), (4, 3), (8, 6))
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (2, 20):
            x, values, bias, _ = inputs(layout, tokens, dtype)
            x = x.detach().clone()
            x[:, 3] = torch.nan
            y = masked_linear(x, values, layout, bias, backend="native")
            assert y[:, :4].isfinite().all()
            assert y[:, 4:].isnan().all()


@pytest.mark.parametrize("name", ["rows", "columns", "cut-blocks"])
def test_strided_and_batched_inputs(name: str):
    layout = make_layout(name)
    x, values, bias, _ = inputs(layout, 24)
    flat = masked_linear(x, values, layout, bias)
    batched = masked_linear(x.view(2, 3, 4, -1), values, layout, bias)
    assert torch.equal(batched, flat.view(2, 3, 4, -1))
    strided = masked_linear(x.t().contiguous().t(), values, layout, bias)
    torch.testing.assert_close(strided, flat)
    single = masked_linear(x[0], values, layout, bias)
    torch.testing.assert_close(single, flat[0])
    y = masked_linear(x, values, layout, bias)
    (dx,) = torch.autograd.grad(y, x, torch.ones(()).expand_as(y))
    (reference,) = torch.autograd.grad(flat, x, torch.ones_like(flat))
    torch.testing.assert_close(dx, reference)


@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_only_needed_gradients_and_saves(name: str):
    layout = make_layout(name)
    x, values, bias, dy = inputs(layout, 6)
    saved: list[tuple[int, ...]] = []

    def note(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = masked_linear(x.detach(), values.detach(), layout, bias)
    assert saved == []
    torch.testing.assert_close(torch.autograd.grad(y, bias, dy)[0], dy.sum(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        masked_linear(x, values, layout, bias)
    if name == "columns":
        assert (6, values.shape[1]) in saved
        assert tuple(x.shape) not in saved


@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_autocast_follows_linear(name: str):
    layout = make_layout(name)
    x, values, bias, dy = inputs(layout, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, values, layout, bias)
        dense = F.linear(x, full_weight(values, layout), bias)
    assert y.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense, atol=0.1, rtol=0.05)
    grads = torch.autograd.grad(y, (x, values, bias), dy.bfloat16())
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("name", ["rows", "columns", "cut-blocks"])
def test_compiles_without_a_break(name: str, activation: str):
    layout = make_layout(name)
    given = inputs(layout, 6)

    def step(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, values, layout, bias, activation=activation).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*given[:3]), step(*given[:3])
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y, given[:3], given[3])
    for a, b in zip(mine, torch.autograd.grad(expected, given[:3], given[3]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not extension.available(), reason="no compiled extension")
def test_the_compiled_kernels_are_poisoned_too():
    """A gather of nothing from no row leaves its memory as it came."""
    rows, none = torch.empty(0, 3), torch.empty(0, dtype=torch.int32)
    untouched = extension.ops().block_grad_input(
        torch.zeros(4, 0), torch.zeros(0, 16, 16), none.new_zeros(1), none, none, 8
    )
    assert untouched.isnan().all()
    assert extension.ops().gather_columns(rows, none).shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_second_derivative_is_refused(create_graph: bool, dtype: torch.dtype):
    for name in ("rows", "blocks"):
        layout = make_layout(name)
        x, values, bias, dy = inputs(layout, 3, dtype)
        y = masked_linear(x, values, layout, bias)
        (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=create_graph)
        assert dx.requires_grad == create_graph
        if create_graph:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                dx.sum().backward()


@pytest.mark.parametrize("name", ["odd-blocks"])
def test_opcheck(name: str):
    layout = make_layout(name)
    assert isinstance(layout, BlockLayout)
    arguments = to_arguments(layout)
    x, values, bias, dy = (t.detach() for t in inputs(layout, 6))
    permuted = [t.t().contiguous().t() for t in (x, dy)]
    for rows, grads in ((x, dy), permuted):
        cases = {
            "masked_linear": (rows, values, bias, *arguments, "gelu", "native"),
            "masked_linear_grad_activation": (grads, dy, "native"),
            "masked_linear_grad_input": (grads, values, *arguments, "native"),
            "masked_linear_grad_values": (grads, rows, *arguments, "native"),
        }
        for op, case in cases.items():
            torch.library.opcheck(getattr(torch.ops.sensikernels, op).default, case)
    index = torch.tensor([0, 3, 4], dtype=torch.int32)
    for matrix in (x, permuted[0]):
        torch.library.opcheck(torch.ops.sensikernels.gather_columns.default, (matrix, index))
        torch.library.opcheck(
            torch.ops.sensikernels.scatter_columns.default, (matrix[:, :3], index, 9, None)
        )


def test_flops_are_those_of_the_kept_entries():
    layout = make_layout("cut-blocks")
    given = inputs(layout, 6)
    with FlopCounterMode(display=False) as counter:
        run(layout, given, "native")
    assert counter.get_total_flops() == 3 * 2 * 6 * layout.kept_entries


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.data())
def test_pack_and_unpack_are_inverse(seed: int, out: int, into: int, data: st.DataObject):
    block = (data.draw(st.integers(1, out)), data.draw(st.integers(1, into)))
    generator = torch.Generator().manual_seed(seed)
    size = [-(-n // b) for n, b in zip((out, into), block, strict=True)]
    grid = torch.rand(size, generator=generator) < 0.5
    weight = torch.randn(out, into, generator=generator)
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:out, :into]
    compact = block != (1, 1) and data.draw(st.booleans())
    layout = layout_of(grid, block, (out, into), compact_input=compact, compact_output=compact)
    values = kept_values(weight, layout)
    assert tuple(values.shape) == layout.values_shape
    assert torch.equal(full_weight(values, layout), weight * mask)
    assert torch.equal(kept_values(full_weight(values, layout), layout), values)
    assert layout.kept_entries == int(mask.sum())
    narrow = full_weight(values, layout, compact=True)
    assert tuple(narrow.shape) == (layout.out_width, layout.in_width)


def test_explain_names_choice_and_reason():
    direct = explain(make_layout("rows", compact="out"))
    assert (direct.form, direct.reason) == ("compact", "nothing to gather or scatter")
    blocks = explain(make_layout("blocks"), tokens=128)
    assert blocks.form == "block-sparse"
    assert "break-even" in blocks.reason


def test_refusals_name_argument_expected_and_got():
    layout = make_layout("blocks")
    x, values, bias, _ = (t.detach() for t in inputs(layout, 2))
    elements = layout_of(torch.eye(4).bool(), (1, 1), (4, 4))
    cases = [
        (r"x: expected \[\.\.\., 48\], got \[2, 47\]", (x[:, 1:], values, layout, bias), {}),
        ("values: expected", (x, values[1:], layout, bias), {}),
        (r"bias: expected \[64\], got \[63\]", (x, values, layout, bias[1:]), {}),
        ("values: expected dtype", (x, values.double(), layout, bias), {}),
        ("activation: expected one of", (x, values, layout), {"activation": "relu"}),
        ("backend: expected one of", (x, values, layout), {"backend": "cuda"}),
        (
            "backend: triton cannot serve this call: x is not on a GPU",
            (x, values, layout),
            {"backend": "triton"},
        ),
        (
            "backend: native cannot serve this call: single elements",
            (x[:, :4], torch.ones(4), elements),
            {"backend": "native"},
        ),
    ]
    for message, arguments, options in cases:
        with pytest.raises(UsageError, match=message):
            masked_linear(*arguments, **options)
