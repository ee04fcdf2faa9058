"""The public linears on a GPU: every pattern, dtype and backend, traced, cast, captured, replayed.

``tests/gpu/test_kernels.py`` holds the launchers to float64; this file holds what is above them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels.layouts import ElementLayout, Layout, assign_, kept_values, layout_of, to_device
from sensikernels.masks.mask import Mask
from sensikernels.nn import MaskedLinear, SelectiveLinear, grouped_selective_linear
from sensikernels.ops.masked_linear import explain, masked_linear, take_kept
from sensikernels.ops.selective_linear import selective_linear
from tests.gpu.captures import captured, rewrite
from tests.ops.linear_cases import GRIDS, make_layout
from tests.tolerance import assert_close_to_reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OUT, IN = 320, 192
KINDS = ["rows", "columns", "heads", "blocks", "elements"]


def on_gpu(name: str, keep: str = "some", compact: str = "") -> Layout:
    return to_device(make_layout(name, keep, compact=compact), "cuda")


def mask_of(kind: str, seed: int = 0) -> Mask:
    """Of [OUT, IN]: always the same number of kept tiles, others for another seed."""
    generator = torch.Generator().manual_seed(seed)

    def some(*size: int) -> Tensor:
        kept = torch.zeros(size, dtype=torch.bool)
        order = torch.randperm(kept.numel(), generator=generator)
        kept.view(-1)[order[: kept.numel() // 3]] = True
        return kept

    return {
        "rows": lambda: Mask.rows(some(OUT), (OUT, IN)),
        "columns": lambda: Mask.columns(some(IN), (OUT, IN)),
        "heads": lambda: Mask.heads(some(OUT // 64), (OUT, IN), head_dim=64),
        "blocks": lambda: Mask.blocks(some(5, 3), (64, 64), (OUT, IN)),
        "elements": lambda: Mask.elements(some(OUT, IN)),
    }[kind]()


def held_to_float64(
    call: Callable[[list[Tensor], str], Tensor], leaves: list[Tensor], dy: Tensor, backend: str
) -> None:
    """Output and all gradients, against the reference in the same dtype and in float64."""

    def run(dtype: torch.dtype, how: str) -> list[Tensor]:
        mine = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y = call(mine, how)
        return [y.detach(), *torch.autograd.grad(y, mine, dy.to(dtype))]

    same, exact = run(dy.dtype, "reference"), run(torch.float64, "reference")
    for got, torchs, truth in zip(run(dy.dtype, backend), same, exact, strict=True):
        assert_close_to_reference(got, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("keep", ["some", "none", "one", "all"])
@pytest.mark.parametrize("compact", ["", "in out"])
@pytest.mark.parametrize("name", GRIDS)
def test_masked_linear(
    name: str, compact: str, keep: str, backend: str, activation: str, dtype: torch.dtype
):
    layout = on_gpu(name, keep, compact)
    for tokens in (0, 1, 67):
        x = torch.randn(tokens, layout.in_width, device="cuda").to(dtype)
        values = kept_values(torch.randn(layout.shape, device="cuda").to(dtype), layout)
        bias = torch.randn(layout.out_width, device="cuda").to(dtype)
        dy = torch.randn(tokens, layout.out_width, device="cuda").to(dtype)

        def call(leaves: list[Tensor], how: str) -> Tensor:
            return masked_linear(
                leaves[0], leaves[1], layout, leaves[2], activation=activation, backend=how
            )

        held_to_float64(call, [x, values, bias], dy, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("keep", ["some", "none", "one", "all"])
@pytest.mark.parametrize("name", GRIDS)
def test_selective_linear(name: str, keep: str, activation: str, dtype: torch.dtype):
    layout = on_gpu(name, keep, "in out")
    x = torch.randn(67, layout.shape[1], device="cuda").to(dtype)
    weight = torch.randn(layout.shape, device="cuda").to(dtype)
    bias = torch.randn(layout.shape[0], device="cuda").to(dtype)
    dy = torch.randn(67, layout.shape[0], device="cuda").to(dtype)
    backends = ["auto", "triton"]

    def call(leaves: list[Tensor], how: str) -> Tensor:
        frozen = weight.to(leaves[0].dtype)
        return selective_linear(
            leaves[0], frozen, leaves[1], layout, leaves[2], activation=activation, backend=how
        )

    for backend in backends:
        held_to_float64(call, [x, kept_values(weight, layout), bias], dy, backend)


@pytest.mark.parametrize("op", ["masked", "selective"])
@pytest.mark.parametrize("name", ["odd-blocks", "blocks", "rows", "columns"])
def test_opcheck(op: str, name: str):
    from sensikernels.layouts import to_arguments

    layout = on_gpu(name)
    assert not isinstance(layout, ElementLayout)
    index = to_arguments(layout)
    out, into = layout.out_width, layout.in_width
    values = kept_values(torch.randn(layout.shape, device="cuda"), layout)
    x, dy = torch.randn(37, into, device="cuda"), torch.randn(37, out, device="cuda")
    ops: Any = torch.ops.sensikernels
    for a, b in ((x, dy), (x.t().contiguous().t(), dy.t().contiguous().t())):
        cases: dict[Any, tuple[Any, ...]]
        if op == "masked":
            bias = torch.randn(out, device="cuda")
            cases = {
                ops.masked_linear: (a, values, bias, *index, "gelu", "triton"),
                ops.masked_linear_grad_activation: (b, dy, "triton"),
                ops.masked_linear_grad_input: (b, values, *index, "triton"),
                ops.masked_linear_grad_values: (b, a, *index, "triton"),
            }
        else:
            twice = [part * 2 for part in index]
            cases = {
                ops.selective_grad_activation: (b, dy, "triton"),
                ops.selective_grad_values: (b, a, *index, "triton"),
                ops.selective_grad_values_grouped: ([b, dy], a, *twice, "triton"),
            }
        for packet, arguments in cases.items():
            torch.library.opcheck(packet.default, arguments)


def pair(kind: str, module: str) -> nn.Module:
    linear = nn.Linear(IN, OUT, device="cuda")
    make = MaskedLinear if module == "masked" else SelectiveLinear
    return make.from_linear(linear, mask_of(kind), activation="gelu")


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = module(x)
    return [y, *torch.autograd.grad(y.sin().sum(), leaves)]


@pytest.mark.parametrize("module", ["masked", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_cast(kind: str, module: str):
    layer = pair(kind, module)
    x = torch.randn(2, 33, IN, device="cuda", requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    for got, eager in zip(step(compiled, x), step(layer, x), strict=True):
        torch.testing.assert_close(got, eager, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("module", ["masked", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind: str, module: str):
    layer = pair(kind, module).to(torch.bfloat16)
    x = torch.randn(4096, IN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first = step(layer, x)
    for _ in range(3):
        for a, b in zip(step(layer, x), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "columns", "heads", "blocks"])
def test_a_captured_layer_follows_a_change_of_mask(kind: str, dtype: torch.dtype):
    """Other tiles, as many: indices and values are rewritten in place; the graph stays."""

    def layout_for(seed: int) -> Layout:
        mask = mask_of(kind, seed)
        return to_device(layout_of(mask.grid, mask.block_shape, mask.shape), "cuda")

    layout, other = layout_for(0), layout_for(1)
    weight = torch.randn(OUT, IN, device="cuda", dtype=dtype)
    x = torch.randn(129, IN, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(129, OUT, device="cuda", dtype=dtype)
    values = take_kept([weight], layout)[0].clone().requires_grad_()
    leaves = [x, values, bias]

    def run() -> list[Tensor]:
        y = masked_linear(x, values, layout, bias, activation="gelu")
        return [y, *torch.autograd.grad(y, leaves, dy)]

    graph, out = captured(run, before=3)
    for change in (False, True):
        if change:
            rewrite(layout, other)
            take_kept([weight], layout, [values.detach()])
        for tensor in out:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for mine, eager in zip(out, run(), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "heads", "columns"])
def test_query_key_and_value_as_one(kind: str, dtype: torch.dtype):
    seeds = (0, 0, 0) if kind == "columns" else (0, 1, 2)
    layers = [
        SelectiveLinear.from_linear(
            nn.Linear(IN, OUT, device="cuda", dtype=dtype), mask_of(kind, s)
        )
        for s in seeds
    ]
    x = torch.randn(2, 65, IN, device="cuda", dtype=dtype, requires_grad=True)
    leaves = [x, *(layer.values for layer in layers), *(layer.bias for layer in layers)]
    dys = list(torch.randn(3, 2, 65, OUT, device="cuda", dtype=dtype))
    got = torch.autograd.grad(grouped_selective_linear(x, layers), leaves, dys)
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def alone(given: list[Tensor]) -> tuple[Tensor, ...]:
        ys = []
        for i, layer in enumerate(layers):
            weight = layer.weight.detach().to(given[0].dtype, copy=True)
            assign_(weight, given[1 + i].detach(), layer.layout)
            ys.append(
                selective_linear(
                    given[0], weight, given[1 + i], layer.layout, given[4 + i], backend="reference"
                )
            )
        return tuple(ys)

    same = torch.autograd.grad(alone(leaves), leaves, dys)
    exact = torch.autograd.grad(alone(wide), wide, [dy.double() for dy in dys])
    for mine, torchs, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(mine, torchs, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_agrees_with_training(kind: str):
    layer = pair(kind, "masked").eval()
    x = torch.randn(300, IN, device="cuda")
    with torch.no_grad():
        alone = layer(x)
        assert torch.equal(layer(x), alone)
    torch.testing.assert_close(alone, layer(x).detach(), atol=1e-3, rtol=1e-3)


def test_what_auto_chooses_without_a_table(monkeypatch: pytest.MonkeyPatch):
    from sensikernels.ops.common import dispatch

    monkeypatch.setattr(dispatch, "load", lambda device: ((), "analytic"))
    dispatch.forget()
    rows, blocks = on_gpu("rows"), on_gpu("blocks")
    half = dict(device="cuda", dtype=torch.bfloat16)
    assert (explain(rows, **half).form, explain(rows, **half).backend) == ("compact", "triton")
    assert explain(blocks, **half).form in ("dense", "block-sparse")
    dispatch.forget()
