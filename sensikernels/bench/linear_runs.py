"""Contestants at a point of the linear suite: modules, called as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels.bench.linear_cases import Case, why_without
from sensikernels.layouts import CompactLayout, Layout, full_weight, kept_values
from sensikernels.nn import MaskedLinear
from sensikernels.ops.selective_linear import selective_linear

Run = Callable[[], object]


def contestants(case: Case, device: str) -> dict[str, Run]:
    """Candidates and baselines of ``case`` by name; those that do not exist for it are left out.

    Each has a weight of its own: one that many read is warmer in the cache. To be run under
    ``recording(case)``.

    Raises:
        AssertionError: a candidate computes something else.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    layout = case.layout(device)
    weight = normal(case.out_features, case.in_features) / case.in_features**0.5
    x, bias = normal(case.tokens, case.in_features), normal(case.out_features)
    dy = normal(case.tokens, case.out_features)
    if case.direction == "grad_weight":
        makers = _grad_weight(case, layout, x, weight, bias, dy)
    else:
        makers = _linears(case, layout, x, weight, bias, dy)
    names = [
        name
        for name in case.candidates + case.baselines
        if name in makers and why_without(name, case, device) is None
    ]
    # What auto runs where nothing is gathered is the compact layer itself.
    if "compact" in names and "auto" in names:
        names.remove("auto")
    return {name: makers[name]() for name in names}


def recording(case: Case) -> AbstractContextManager[object]:
    """Gradients on where the case needs them, off where it is forward alone."""
    return torch.set_grad_enabled(case.direction != "forward")


def _grad_weight(
    case: Case, layout: Layout, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Callable[[], Run]]:
    values = kept_values(weight, layout).clone().requires_grad_()
    y = selective_linear(x, weight, values, layout, bias)

    def selective() -> Tensor:
        return torch.autograd.grad(y, values, dy, retain_graph=True)[0]

    def dense() -> Tensor:
        return dy.T @ x

    _gate(selective(), kept_values(dense(), layout), case)
    runs: dict[str, Callable[[], Run]] = {"selective": lambda: selective, "dense": lambda: dense}
    if isinstance(layout, CompactLayout):
        narrow = dy if layout.rows is None else dy[:, layout.rows.long()]
        read = x if layout.columns is None else x[:, layout.columns.long()]
        runs["hand-compacted"] = lambda: lambda: narrow.T @ read
    return runs


def _linears(
    case: Case, layout: Layout, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Callable[[], Run]]:
    compact = isinstance(layout, CompactLayout)
    rows, columns = (layout.rows, layout.columns) if compact else (None, None)
    read = x if columns is None else x[:, columns.long()]
    narrow_bias = bias if rows is None else bias[rows.long()]
    narrow_dy = dy if rows is None else dy[:, rows.long()]
    values, mask = (
        kept_values(weight, layout),
        full_weight(torch.ones_like(kept_values(weight, layout)), layout),
    )
    backward = case.direction == "forward+backward"

    def ours(backend: str) -> nn.Module:
        return MaskedLinear.from_linear(
            linear(weight, bias),
            case.mask(),
            compact_input=case.compact,
            compact_output=case.compact,
            backend=backend,
        )

    def masked(backend: str) -> Callable[[], Run]:
        return lambda: _step(ours(backend), read, narrow_dy, backward)

    def peer(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Run]:
        return lambda: _step(_Peer(function, weight, bias), x, dy, backward)

    with torch.no_grad():
        expected = F.linear(x, weight * mask, bias)
        _gate(ours("auto")(read), expected if rows is None else expected[:, rows.long()], case)
    return {
        "auto": masked("auto"),
        "compact": masked("auto"),
        "block-sparse": masked("native" if x.is_cpu else "triton"),
        "dense": lambda: _step(linear(weight, bias), x, dy, backward),
        "hand-compacted": lambda: _step(linear(values, narrow_bias), read, narrow_dy, backward),
        "masked-dense": peer(lambda x, w, b: F.linear(x, w * mask, b)),
        "compiled-masked": peer(lambda x, w, b: _compiled()(x, w, mask, b)),
        "torch-bsr": lambda: _bsr(x, weight * mask, bias, case.block),
        "semi-structured": lambda: _semi_structured(x, weight, bias),
    }


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """An ``nn.Linear`` of copies."""
    module = nn.Linear(1, 1, device="meta")
    module.out_features, module.in_features = weight.shape
    module.weight, module.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return module


class _Peer(nn.Module):
    """A linear by any function of input, weight and bias."""

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor], Tensor], weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One graph for all shapes of a dtype and direction, but for one token and square weights.

    They are more than dynamo's limit, past which it would run eagerly and say nothing.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64

    def masked(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight * mask, bias)

    return torch.compile(masked, dynamic=True)


def _step(module: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Run:
    """Forward, or forward and all three gradients."""
    if not backward:
        return lambda: module(x)
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    return lambda: torch.autograd.grad(module(leaves[0]), leaves, dy)


def _bsr(x: Tensor, weight: Tensor, bias: Tensor, block: int) -> Run:
    sparse = weight.to_sparse_bsr((block, block))
    return lambda: F.linear(x, sparse, bias)


def _semi_structured(x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    groups = weight.view(-1, 4)
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1.0)
    sparse = torch.sparse.to_sparse_semi_structured(weight * kept.view_as(weight))
    return lambda: F.linear(x, sparse, bias)


def _gate(got: Tensor, expected: Tensor, case: Case) -> None:
    """No timing of a wrong result: RMS of the difference against RMS of the result."""
    error = (got.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    # A GPU's float32 products are TF32's.
    bound = 0.02 if case.dtype == torch.bfloat16 else 2e-3 if got.is_cuda else 1e-4
    if got.numel() and not error <= bound * size:
        raise AssertionError(f"{case}: relative RMS error {float(error / size):.2e} > {bound}")
