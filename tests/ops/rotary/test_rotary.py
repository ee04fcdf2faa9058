"""Rotary embeddings: transformers' own, turned back exactly, any layout, clear errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb, rotate_half

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.rotary import explain, rotary
from tests.ops.agreement import (
    check_autocast_changes_nothing,
    check_compiles_whole,
    check_same_bits_on_any_threads,
)
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (0, 2, 8),
    (5, 0, 8),
    (5, 3, 0),
    (1, 1, 2),
    (3, 5, 6),
    (17, 2, 34),
    (130, 12, 64),
    (9, 3, 96),
    (2, 1, 1026),
    (40_009, 1, 2),
    (1, 40_009, 2),
    (1, 1, 80_018),
]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """float32 ``[tokens, size // 2]``, as a model of many positions has them."""
    place = torch.arange(tokens)[:, None] * 10_000 ** (-torch.arange(size // 2) / max(size // 2, 1))
    return place.cos(), place.sin()


def theirs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What transformers does with one tensor, the angles in their own dtype."""
    cos, sin = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


def run(f, x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradient."""
    x = x.detach().requires_grad_()
    y = f(x, cos, sin)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


def check(backend: str, dtype: torch.dtype, x: Tensor, dy: Tensor, narrow: bool = False) -> None:
    """As good as transformers' in the same dtype, from a float32 or a narrow cos and sin."""
    x, dy = x.to(dtype), dy.to(dtype)
    cos, sin = (t.to(dtype if narrow else torch.float32) for t in angles(x.shape[0], x.shape[2]))
    got = run(lambda *a: rotary(*a, backend=backend), x, cos, sin, dy)
    same = run(theirs, x, cos.to(dtype), sin.to(dtype), dy)
    exact = run(theirs, x.double(), cos.double(), sin.double(), dy.double())
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert one.is_contiguous()
        assert_close_to_reference(one, torch_own, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_as_good_as_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], narrow: bool
) -> None:
    need(backend)
    check(backend, dtype, torch.randn(shape), torch.randn(shape), narrow)


@given(
    shape=st.tuples(st.integers(0, 30), st.integers(0, 5), st.integers(0, 60).map(lambda n: 2 * n)),
    dtype=st.sampled_from(DTYPES),
    narrow=st.booleans(),
)
@settings(max_examples=40)
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype, narrow: bool) -> None:
    need("native")
    check("native", dtype, torch.randn(shape), torch.randn(shape), narrow)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modernberts_queries_and_keys(backend: str) -> None:
    """``qkv[:, :2 heads]`` turned at once is what transformers makes of q and k apart."""
    need(backend)
    tokens, heads, size = 11, 3, 8
    qkv = torch.randn(tokens, 3 * heads, size)
    cos, sin = angles(tokens, size)
    full = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    q, k, _ = (t.transpose(0, 1)[None] for t in qkv.split(heads, 1))
    expected = torch.cat([t[0].transpose(0, 1) for t in apply_rotary_pos_emb(q, k, *full)], 1)
    mine = qkv[:, : 2 * heads]
    assert not mine.is_contiguous()
    torch.testing.assert_close(rotary(mine, cos, sin, backend=backend), expected)


@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 40),
    shift=st.integers(0, 50),
    turn=st.floats(-3, 3),
)
@settings(max_examples=40)
def test_laws_of_a_rotation(heads: int, half: int, shift: int, turn: float) -> None:
    """Lengths stay, angles add up, the inverse undoes; products depend on distances alone."""
    need("native")
    x = torch.randn(6, heads, 2 * half)
    at = (torch.arange(6.0)[:, None] + shift) * torch.linspace(0.1, 1, half)
    once = rotary(x, at.cos(), at.sin())
    pairs = [t.unflatten(-1, (2, half)).norm(dim=-2) for t in (x, once)]
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)
    more = at + turn
    twice = rotary(once, torch.full_like(at, turn).cos(), torch.full_like(at, turn).sin())
    torch.testing.assert_close(twice, rotary(x, more.cos(), more.sin()), rtol=1e-4, atol=1e-4)
    back = torch.ops.sensikernels.rotary(once, at.cos(), at.sin(), True, "native")
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    start = torch.arange(6.0)[:, None] * torch.linspace(0.1, 1, half)
    here = rotary(x, start.cos(), start.sin())
    products = [torch.einsum("ahd,bhd->hab", t, t) for t in (here, once)]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(backend: str, dtype: torch.dtype) -> None:
    need(backend)
    layouts = [
        torch.randn(7, 12, 8)[:, 2:6],
        torch.randn(4, 7, 8).transpose(0, 1),
        torch.randn(8, 7, 4).permute(1, 2, 0),
        torch.randn(7, 1, 8).expand(7, 4, 8),
        torch.randn(14, 8, 16)[::2, ::2, ::2],
        torch.randn(1, 1, 1).expand(7, 4, 8),
    ]
    for x in layouts:
        for dy in layouts:
            check(backend, dtype, x, dy)
    cos, sin = angles(7, 16)
    x = layouts[0]
    strided = rotary(x, cos[:, ::2], sin[:, ::2], backend=backend)
    dense = rotary(x, cos[:, ::2].contiguous(), sin[:, ::2].contiguous(), backend=backend)
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_threads(dtype: torch.dtype) -> None:
    need("native")
    x, dy = torch.randn(2, 3000, 4, 36).to(dtype)
    check_same_bits_on_any_threads(lambda: run(rotary, x, *angles(3000, 36), dy))


def test_saves_no_activation() -> None:
    need("native")
    x = torch.randn(4, 2, 6, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(x, *angles(4, 6))
    assert sum(t.numel() for t in saved) == 2 * 4 * 3


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_gradients_of_gradients(kind: torch.dtype) -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.to(kind) for t in angles(3, 6))
    assert explain(x).backend == "reference"
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, cos, sin), x)


def test_the_kernels_gradient_has_a_gradient() -> None:
    need("native")
    x, dy = torch.randn(2, 3, 2, 6)
    x.requires_grad_(), dy.requires_grad_()
    cos, sin = angles(3, 6)
    (dx,) = torch.autograd.grad(rotary(x, cos, sin), x, dy, create_graph=True)
    (back,) = torch.autograd.grad(dx, dy, x.detach())
    torch.testing.assert_close(back, rotary(x.detach(), cos, sin))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_checks(backend: str, dtype: torch.dtype) -> None:
    need(backend)
    cos, sin = angles(5, 8)
    for x in (torch.randn(5, 9, 8)[:, :6], torch.randn(8, 2, 5).permute(2, 1, 0)):
        for inverse in (False, True):
            call = (x.to(dtype), cos, sin, inverse, backend)
            torch.library.opcheck(torch.ops.sensikernels.rotary.default, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend: str) -> None:
    need(backend)
    x = torch.randn(4, 2, 6)
    for dtype in DTYPES:
        run_it = lambda: rotary(x.to(dtype), *angles(4, 6), backend=backend)  # noqa: B023, E731
        check_autocast_changes_nothing(run_it, dtype)


def test_compiles_whole() -> None:
    layer = nn.Linear(16, 48, bias=False)
    cos, sin = angles(8, 8)

    def turned(x: Tensor) -> Tensor:
        return rotary(layer(x).unflatten(-1, (6, 8))[:, :4], cos, sin).square().sum()

    check_compiles_whole(turned, layer, torch.randn(8, 16))


BAD = [
    ({"x": torch.randn(3, 8)}, r"x: expected floating \[tokens, heads, size\], size even, got"),
    ({"x": torch.randn(3, 2, 7)}, r"size even, got torch.float32 \[3, 2, 7\] on cpu"),
    ({"x": torch.ones(3, 2, 8, dtype=torch.int64)}, "x: expected floating"),
    ({"cos": torch.randn(3, 8)}, r"cos: expected float32 \[3, 4\] on cpu, got torch.float32 \[3"),
    ({"sin": torch.randn(2, 4)}, r"sin: expected float32 \[3, 4\] on cpu"),
    ({"sin": torch.randn(3, 4).double()}, "sin: expected float32"),
    ({"cos": torch.randn(3, 4).bfloat16()}, "cos: expected float32"),
    ({"cos": torch.randn(3, 4, requires_grad=True)}, "cos: expected a tensor that requires no"),
    ({"sin": torch.randn(3, 4, requires_grad=True)}, "sin: expected a tensor that requires no"),
    ({"x": torch.randn(3, 2, 8).half(), "backend": "native"}, "native cannot serve this call"),
    ({"backend": "triton"}, "triton cannot serve this call"),
    ({"backend": "fast"}, "backend: expected one of auto, native, reference, triton, got 'fast'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    call = {"x": torch.randn(3, 2, 8), "cos": torch.randn(3, 4), "sin": torch.randn(3, 4)}
    with pytest.raises(UsageError, match=message):
        rotary(**{**call, **change})
