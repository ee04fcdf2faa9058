"""Checks of the fused elementwise operators, run in Triton's interpreter and on a GPU alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.bias_gelu import bias_gelu
from sensikernels.ops.dropout import dropout
from sensikernels.ops.dropout_add_norm import dropout_add_norm
from sensikernels.ops.embed_norm import embed_norm
from sensikernels.ops.geglu import geglu
from sensikernels.ops.rotary import rotary
from tests.tolerance import assert_close_to_reference

Run = Callable[..., Tensor]


def run(f: Run, leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients, dense."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = f(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    return [y, *(g.to_dense() if g.is_sparse else g for g in grads)]


def check(ours: Run, parts: Run, leaves: Sequence[Tensor], dy: Tensor) -> None:
    """``ours`` against PyTorch's parts in dy's dtype and in float64; the same bits twice."""
    got = run(ours, leaves, dy)
    same = run(parts, [t.to(dy.dtype) for t in leaves], dy)
    exact = run(parts, [t.double() for t in leaves], dy.double())
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(one, torch_own.to(one.dtype), truth)
    again = run(ours, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def check_bias_gelu(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, *, biased: bool
) -> None:
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    leaves = [2 * x, torch.randn(shape[-1], device=device)] if biased else [2 * x]

    def parts(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias)

    check(lambda *a: bias_gelu(*a, backend="triton"), parts, leaves, dy)


def check_geglu(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, biased: bool) -> None:
    n = shape[-1] // 2
    x, dy = (torch.randn(*shape[:-1], size, device=device).to(dtype) for size in (2 * n, n))
    leaves = [2 * x, torch.randn(2 * n, device=device)] if biased else [2 * x]

    def parts(x: Tensor, bias: Tensor | None = None) -> Tensor:
        z = x if bias is None else x + bias
        return F.gelu(z[..., :n]) * z[..., n:]

    check(lambda *a: geglu(*a, backend="triton"), parts, leaves, dy)


def check_rotary(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, fused: bool
) -> None:
    """``fused``: x is the first two thirds of the heads of a projection."""
    tokens, heads, size = shape
    x = torch.randn(tokens, 3 * heads if fused else heads, size, device=device).to(dtype)
    dy = torch.randn(tokens, 2 * heads if fused else heads, size, device=device).to(dtype)
    angle = torch.randn(tokens, size // 2, device=device)
    cos, sin = angle.cos(), angle.sin()

    def parts(x: Tensor) -> Tensor:
        x = x[:, : dy.shape[1]]
        first, second = x[..., : size // 2], x[..., size // 2 :]
        c, s = (t.to(x.dtype)[:, None] for t in (cos, sin))
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    check(lambda x: rotary(x[:, : dy.shape[1]], cos, sin, backend="triton"), parts, [x], dy)


def _seed(device: str) -> Tensor:
    return torch.tensor(2**40 + 12345, device=device)


def check_dropout_add_norm(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, p: float
) -> None:
    seed, hidden = _seed(device), shape[-1]
    leaves = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    leaves += [torch.rand(hidden, device=device) + 0.5, torch.randn(hidden, device=device)]
    dy = torch.randn(shape, device=device).to(dtype)

    def parts(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = residual + dropout(x, p, seed=seed, backend="reference")
        return F.layer_norm(z, (hidden,), weight, bias, 1e-12)

    def ours(*a: Tensor) -> Tensor:
        return dropout_add_norm(*a, dropout=p, seed=seed, backend="triton")

    check(ours, parts, leaves, dy)


def check_embed_norm(
    shape: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    device: str,
    p: float,
    *,
    sparse: bool = False,
) -> None:
    seed, sizes = _seed(device), (37, 11, 2)
    i, j, k = (torch.randint(size, shape, device=device) for size in sizes)
    leaves = [torch.randn(size, hidden, device=device).to(dtype) for size in sizes]
    leaves += [torch.rand(hidden, device=device) + 0.5, torch.randn(hidden, device=device)]
    dy = torch.randn(*shape, hidden, device=device).to(dtype)

    def parts(word: Tensor, position: Tensor, kind: Tensor, *affine: Tensor) -> Tensor:
        z = F.embedding(i, word) + F.embedding(j, position) + F.embedding(k, kind)
        y = F.layer_norm(z, (hidden,), *affine, 1e-12)
        return dropout(y, p, seed=seed, backend="reference")

    named = {"dropout": p, "seed": seed, "sparse": sparse, "backend": "triton"}
    check(lambda *a: embed_norm(i, j, k, *a, **named), parts, leaves, dy)
