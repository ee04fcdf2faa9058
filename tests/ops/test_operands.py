"""Operands of any layout in memory: what the reference takes the compiled kernels take, alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels.layouts import Layout
from sensikernels.ops.bias_gelu import bias_gelu
from sensikernels.ops.cross_entropy import cross_entropy
from sensikernels.ops.dropout import dropout
from sensikernels.ops.dropout_add_norm import dropout_add_norm
from sensikernels.ops.embed_norm import embed_norm
from sensikernels.ops.geglu import geglu
from sensikernels.ops.group_reduce import group_reduce
from sensikernels.ops.masked_linear import masked_linear
from sensikernels.ops.rotary import rotary
from sensikernels.ops.selective_linear import selective_linear
from sensikernels.ops.varlen_attention import varlen_attention
from tests.ops.linear_cases import GRIDS, make_layout

pytestmark = pytest.mark.skipif(
    extension.why_not() is not None, reason=f"native: {extension.why_not()}"
)
Call = Callable[..., Tensor]
LEADING: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (2, 3), (0, 3), (2, 0, 3), (4, 1, 2))
WIDTHS = (1, 2, 3, 15, 16, 17, 64, 100)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def strided(t: Tensor) -> Tensor:
    wide = torch.zeros([2 * n for n in t.shape], dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def inside(t: Tensor) -> Tensor:
    wide = torch.zeros([n + 3 for n in t.shape], dtype=t.dtype)
    return wide[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def narrowest(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t


MEMORY = (Tensor.clone, transposed, strided, inside, expanded, narrowest)


def laid_out(rng: random.Random, *tensors: Tensor) -> list[Tensor]:
    return [rng.choice(MEMORY)(t) for t in tensors]


def run(call: Call, tensors: Sequence[Tensor], backend: str, memory: Call) -> list[Tensor]:
    """Result and gradients; the gradient coming in lies in memory as ``memory`` says."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    y = call(*leaves, backend=backend)
    dy = memory(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    trained = [t for t in leaves if t.is_floating_point()]
    return [y.detach(), *(g.to_dense() for g in torch.autograd.grad(y, trained, dy))]


def check(call: Call, tensors: Sequence[Tensor], rng: random.Random, tolerance: float) -> None:
    memory = rng.choice(MEMORY)
    want, got = (run(call, tensors, backend, memory) for backend in ("reference", "native"))
    about = [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        largest = float(a.abs().nan_to_num().max()) if a.numel() else 0.0
        close = torch.allclose(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * (1 + largest), equal_nan=True
        )
        assert close, about


def floating(rng: random.Random) -> tuple[torch.dtype, float]:
    return rng.choice([(torch.float32, 2e-3), (torch.bfloat16, 8e-2)])


def test_elementwise():
    rng = random.Random(0)
    for _ in range(300):
        dtype, tolerance = floating(rng)
        width = rng.choice(WIDTHS)
        shape = (*rng.choice(LEADING), width)
        x, residual = laid_out(rng, *(torch.randn(shape).to(dtype) for _ in range(2)))
        bias, weight = laid_out(rng, torch.randn(width).to(dtype), torch.rand(width) + 0.5)
        seed, p = torch.tensor(rng.randrange(1 << 60)), rng.choice([0.0, 0.3, 1.0])
        check(bias_gelu, [x, bias], rng, tolerance)
        check(bias_gelu, [x], rng, tolerance)
        check(partial(dropout, p=0.3, seed=seed), [x], rng, tolerance)
        if width % 2 == 0:
            check(geglu, [x, bias], rng, tolerance)
            check(geglu, [x], rng, tolerance)
        if width > 1:  # of one element nothing is left but rounding
            norm = partial(dropout_add_norm, dropout=p, seed=seed, eps=1e-3)
            check(norm, [x, residual, weight, bias], rng, 9e-2 if dtype != torch.float32 else 2e-3)


def test_rotations():
    rng = random.Random(4)
    for _ in range(150):
        dtype, tolerance = floating(rng)
        tokens, heads, half = rng.choice([0, 1, 7]), rng.choice([0, 1, 3]), rng.choice([0, *WIDTHS])
        x = torch.randn(tokens, heads, 2 * half).to(dtype)
        kind = rng.choice([dtype, torch.float32])
        cos, sin = laid_out(rng, *(torch.randn(tokens, half).to(kind) for _ in range(2)))
        check(partial(rotary, cos=cos, sin=sin), laid_out(rng, x), rng, tolerance)


def test_embeddings_and_losses():
    rng = random.Random(1)
    for _ in range(200):
        dtype, tolerance = floating(rng)
        width, sizes = rng.choice(WIDTHS[1:]), (5, 3, 2)
        shape = rng.choice(LEADING)
        ids = laid_out(rng, *(torch.randint(n, shape) for n in sizes))
        tables = laid_out(rng, *(torch.randn(n, width).to(dtype) for n in sizes))
        affine = laid_out(rng, torch.rand(width) + 0.5, torch.randn(width))
        norm = partial(embed_norm, eps=1e-3, dropout=0.3, seed=torch.tensor(7))
        check(norm, [*ids, *tables, *affine], rng, tolerance)
        rows = rng.choice([0, 1, 2, 7])
        labels = torch.randint(width, (rows,))
        labels[rows // 2 : rows // 2 + 1] = -100
        logits = laid_out(rng, 5 * torch.randn(rows, width).to(dtype))
        check(cross_entropy, [*logits, *laid_out(rng, labels)], rng, tolerance)


def test_attention():
    rng = random.Random(2)
    for _ in range(150):
        dtype, tolerance = floating(rng)
        heads, size, out = rng.choice([1, 2, 3]), rng.choice([1, 3, 17, 64]), rng.choice([1, 33])
        lengths = [rng.choice([0, 1, 8, 31, 65]) for _ in range(rng.choice([0, 1, 3]))]
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        tokens = int(cu[-1]) + rng.choice([0, 3])
        shapes = (tokens, heads, size), (tokens, heads, size), (tokens, heads, out)
        qkv = laid_out(rng, *(torch.randn(shape).to(dtype) for shape in shapes))
        call = partial(
            varlen_attention,
            cu_seqlens=strided(cu),
            max_length=max(lengths, default=0),
            dropout=rng.choice([0.0, 0.3]),
            seed=torch.tensor(7),
        )
        check(call, qkv, rng, tolerance)


@pytest.mark.parametrize("name", list(GRIDS))
def test_linears(name: str):
    rng = random.Random(name)
    for keep in ("some", "none", "one", "all"):
        layout: Layout = make_layout(name, keep)
        for _ in range(6):
            dtype, tolerance = floating(rng)
            tokens = rng.choice([(0,), (1,), (5,), (2, 3)])
            x = torch.randn(*tokens, layout.in_width).to(dtype)
            values = torch.randn(layout.values_shape).to(dtype)
            bias = torch.randn(layout.out_width).to(dtype)
            activation = rng.choice(["none", "gelu"])

            def masked(x: Tensor, values: Tensor, bias: Tensor, backend: str) -> Tensor:
                rest = {"activation": activation, "backend": backend}  # noqa: B023
                return masked_linear(x, values, layout, bias, **rest)  # noqa: B023

            def selective(x: Tensor, values: Tensor, bias: Tensor, backend: str) -> Tensor:
                weight = torch.zeros(layout.shape, dtype=x.dtype)  # noqa: B023
                zeros = torch.zeros_like(values) * values
                return selective_linear(x, weight, zeros, layout, bias, backend=backend)  # noqa: B023

            check(masked, laid_out(rng, x, values, bias), rng, tolerance)
            check(selective, laid_out(rng, x, values, bias), rng, tolerance)


def test_reductions():
    rng = random.Random(3)
    for _ in range(100):
        shapes = [rng.choice([(4, 6), (5,), (0, 3), (3, 0), (), (2, 3, 4)]) for _ in range(3)]
        weights = laid_out(rng, *(torch.randn(s) for s in shapes))
        grads = laid_out(rng, *(torch.randn(s) for s in shapes))
        ids = [torch.randint(-1, 2, (s[0] if s else 1,)).int() for s in shapes]
        groups = [
            rng.choice(["tensor", "row", "column", ("block", 2, 2), ("ids", i, 2)]) for i in ids
        ]
        names = ["sum_abs_wg", "sum_wg", "max_abs_grad"]
        want, got = (
            group_reduce(weights, grads, names, groups=groups, backend=b).arena
            for b in ("reference", "native")
        )
        torch.testing.assert_close(got, want)
