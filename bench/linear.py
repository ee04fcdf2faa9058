"""Masked and selective linears against what else a user could run, each gated by correctness."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import interleave
from sensikernels.layouts import Layout, PackedLayout, layout_of, pack, unpack
from sensikernels.ops.masked_linear import explain, masked_linear
from sensikernels.ops.selective_linear import selective_linear

SHAPES = {
    "bert-base": ((768, 768), (768, 3072), (3072, 768)),
    "bert-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "minilm": ((384, 384), (384, 1536), (1536, 384)),
}
TOKENS = (1, 128, 1280, 4096, 16384)
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)
BASELINES = (
    "dense", "masked-dense", "hand-packed", "torch-bsr", "compiled-masked", "semi-structured",
)  # fmt: skip
QUICK_SECONDS = 55.0
HEAD = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point: a weight ``[out_features, in_features]``, its mask, tokens, dtype, direction."""

    pattern: str
    density: float
    in_features: int
    out_features: int
    tokens: int
    dtype: torch.dtype
    direction: str = "forward+backward"
    block: int = 64
    candidates: tuple[str, ...] = ("packed", "auto")
    baselines: tuple[str, ...] = BASELINES

    def layout(self, device: str) -> Layout:
        """Compact where a planned model is: narrow outputs of rows, narrow inputs of columns."""
        shape = (self.out_features, self.in_features)
        block = {
            "rows": (1, shape[1]),
            "columns": (shape[0], 1),
            "heads": (HEAD, shape[1]),
            "blocks": (self.block, self.block),
        }[self.pattern]
        size = [-(-n // b) for n, b in zip(shape, block, strict=True)]
        tiles = size[0] * size[1]
        order = torch.randperm(tiles, generator=torch.Generator().manual_seed(0))
        # Multiples of 16: what a planner rounds kept counts to.
        step = 16 if self.pattern in ("rows", "columns") else 1
        kept = max(step, round(tiles * self.density / step) * step)
        grid = torch.zeros(tiles, dtype=torch.bool)
        grid[order[:kept]] = True
        compact = self.pattern != "blocks" and self.direction != "grad_weight"
        return layout_of(
            grid.view(size).to(device), block, shape,
            compact_input=compact, compact_output=compact,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The columns of a row that name this case."""
        name = f"{self.in_features}x{self.out_features}"
        return {
            "suite": "linear",
            "case": f"{name} {self.pattern} {self.density:g} T{self.tokens}",
            "pattern": self.pattern,
            "density": self.density,
            "block": f"{self.block}x{self.block}" if self.pattern == "blocks" else "",
            "tokens": self.tokens,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
        }


def run(*, device: str, quick: bool, progress: Callable[[str], object]) -> list[Row]:
    """Every case's candidates against its baselines, interleaved; fp32 at ``medium`` precision.

    ``progress`` is told each case as it comes. ``quick`` covers each bar of the suite and ends
    within a minute.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    start, rows = time.perf_counter(), []
    try:
        for case in quick_cases() if quick else all_cases(device):
            progress(f"linear: {case.facts()['case']} {case.pattern} {case.density}")
            left = QUICK_SECONDS - (time.perf_counter() - start) if quick else None
            rows += measure(case, device, rounds=5 if quick else 15, left=left)
    finally:
        torch.set_float32_matmul_precision(before)
    return rows


def quick_cases() -> list[Case]:
    """Bar by bar: packed, blocks, selective rows, and ``auto`` over the densities."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        common: dict[str, Any] = dict(tokens=1024, dtype=dtype, in_features=768, out_features=3072)
        cases += [
            Case(pattern="rows", density=0.1, direction="grad_weight", candidates=("selective",),
                 baselines=("dense",), **common),
            Case(pattern="blocks", density=0.25, candidates=("block-sparse",),
                 baselines=("dense", "masked-dense"), **common),
        ]  # fmt: skip
        small, up, down = SHAPES["bert-base"]
        points = [(up, "rows", d) for d in (0.5, 0.25, 0.1)]
        points += [(down, "columns", d) for d in (0.5, 0.25, 0.1)]
        points += [(small, pattern, 0.5) for pattern in ("rows", "columns")]
        cases += [
            Case(pattern=pattern, density=density, candidates=("packed",),
                 baselines=("dense", "hand-packed"),
                 **{**common, "in_features": into, "out_features": out})
            for (into, out), pattern, density in points
        ]  # fmt: skip
        cases += [
            Case(pattern="blocks", density=density, candidates=("auto",), baselines=("dense",),
                 **common)
            for density in (1.0, 0.75, 0.5)
        ]  # fmt: skip
    bsr: dict[str, Any] = dict(common, tokens=128, dtype=torch.float32)
    cases.append(
        Case(pattern="blocks", density=0.25, direction="forward", candidates=("block-sparse",),
             baselines=("torch-bsr",), **bsr)
    )  # fmt: skip
    return cases


def all_cases(device: str) -> list[Case]:
    """The full table."""
    cases = []
    shapes = [shape for group in SHAPES.values() for shape in group]
    dtypes = (torch.bfloat16, torch.float32)
    table = itertools.product(shapes, TOKENS, ("rows", "columns", "heads", "blocks"), DENSITIES,
                              ("forward", "forward+backward", "grad_weight"), dtypes)  # fmt: skip
    for (into, out), tokens, pattern, density, direction, dtype in table:
        if pattern == "heads" and out % HEAD:
            continue
        names = ("block-sparse",) if pattern == "blocks" else ("packed",)
        candidates: tuple[str, ...]
        baselines: tuple[str, ...]
        if direction == "grad_weight":
            candidates, baselines = ("selective",), ("dense", "hand-packed")
        else:
            candidates, baselines = (*names, "auto"), BASELINES
        cases.append(
            Case(pattern=pattern, density=density, in_features=into, out_features=out,
                 tokens=tokens, dtype=dtype, direction=direction, candidates=candidates,
                 baselines=baselines)
        )  # fmt: skip
    return cases


def measure(case: Case, device: str, *, rounds: int, left: float | None) -> list[Row]:
    """Gate, then time; a baseline that does not exist for the case is left out."""
    contestants = _contestants(case, device)
    share = None if left is None else max(0.3, min(2.5, left / 12))
    times = interleave(
        contestants, rounds=rounds, warmup=1 if left is not None else 2, device=device,
        budget_s=share,
    )  # fmt: skip
    flops = 2 * case.tokens * case.layout(device).kept_entries
    flops *= 3 if case.direction == "forward+backward" else 1
    return [
        row(
            candidate_time=times[candidate],
            baseline_time=times[baseline],
            candidate=candidate,
            baseline=baseline,
            extra={"gflops": flops / times[candidate].median_ms / 1e6},
            **case.facts(),
        )
        for candidate, baseline in itertools.product(case.candidates, case.baselines)
        if candidate in times and baseline in times
    ]


def _contestants(case: Case, device: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    layout = case.layout(device)
    weight = normal(case.out_features, case.in_features) / case.in_features**0.5
    x, bias = normal(case.tokens, case.in_features), normal(case.out_features)
    dy = normal(case.tokens, case.out_features)
    if case.direction == "grad_weight":
        return _grad_weight(case, layout, x, weight, bias, dy)
    return _linears(case, layout, x, weight, bias, dy)


def _grad_weight(
    case: Case, layout: Layout, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Callable[[], object]]:
    values = pack(weight, layout).clone().requires_grad_()
    y = selective_linear(x, weight, values, layout, bias)

    def selective() -> Tensor:
        return torch.autograd.grad(y, values, dy, retain_graph=True)[0]

    def dense() -> Tensor:
        return dy.T @ x

    runs: dict[str, Callable[[], object]] = {"selective": selective, "dense": dense}
    if isinstance(layout, PackedLayout):
        narrow = dy if layout.rows is None else dy[:, layout.rows.long()]
        read = x if layout.columns is None else x[:, layout.columns.long()]
        runs["hand-packed"] = lambda: narrow.T @ read
    _gate(selective(), pack(dense(), layout), case)
    return {name: run for name, run in runs.items() if name in case.candidates + case.baselines}


def _linears(
    case: Case, layout: Layout, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> dict[str, Callable[[], object]]:
    rows = columns = None
    if isinstance(layout, PackedLayout):
        rows, columns = layout.rows, layout.columns
    read = x if columns is None else x[:, columns.long()]
    narrow_bias = bias if rows is None else bias[rows.long()]
    narrow_dy = dy if rows is None else dy[:, rows.long()]
    values, mask = pack(weight, layout), unpack(torch.ones_like(pack(weight, layout)), layout)
    backward = case.direction == "forward+backward"

    def mine(backend: str) -> Callable[[], object]:
        def linear(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return masked_linear(x, values, layout, bias, backend=backend)

        return _step(linear, read, values, narrow_bias, narrow_dy, backward)

    def masked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight * mask, bias)

    named = "native" if x.device.type == "cpu" else "triton"
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "auto": lambda: mine("auto"),
        "packed": lambda: mine("auto"),
        "block-sparse": lambda: mine(named),
        "dense": lambda: _step(F.linear, x, weight, bias, dy, backward),
        "masked-dense": lambda: _step(masked, x, weight, bias, dy, backward),
        "compiled-masked": lambda: _step(torch.compile(masked), x, weight, bias, dy, backward),
    }
    if isinstance(layout, PackedLayout):
        makers["hand-packed"] = lambda: _step(
            F.linear, read, values.clone(), narrow_bias, narrow_dy, backward
        )
    elif not backward and case.dtype == torch.float32:
        sparse = (weight * mask).to_sparse_bsr((case.block, case.block))
        makers["torch-bsr"] = lambda: lambda: F.linear(x, sparse, bias)
    if x.is_cuda and case.density == 0.5 and not backward:
        makers["semi-structured"] = lambda: _semi_structured(x, weight, bias)
    expected = F.linear(x, weight * mask, bias)
    with torch.no_grad():
        _gate(
            masked_linear(read, values, layout, narrow_bias),
            expected if rows is None else expected[:, rows.long()],
            case,
        )
    wanted = case.candidates + case.baselines
    return {name: make() for name, make in makers.items() if name in wanted}


def _step(
    linear: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    backward: bool,
) -> Callable[[], object]:
    """Forward, or forward and all three gradients."""
    if not backward:
        return torch.no_grad()(lambda: linear(x, weight, bias))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return lambda: torch.autograd.grad(linear(*leaves), leaves, dy)


def _semi_structured(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    from torch.sparse import to_sparse_semi_structured

    pairs = weight.view(-1, 4).abs().topk(2, dim=1).indices
    kept = torch.zeros_like(weight.view(-1, 4)).scatter_(1, pairs, 1.0)
    sparse = to_sparse_semi_structured(weight * kept.view_as(weight))
    return torch.no_grad()(lambda: F.linear(x, sparse, bias))


def _gate(got: Tensor, expected: Tensor, case: Case) -> None:
    """No timing of a wrong result: RMS of the difference against RMS of the result."""
    error = (got.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    bound = 0.02 if case.dtype == torch.bfloat16 else 1e-4
    if got.numel() and not error <= bound * size:
        raise AssertionError(f"{case}: relative RMS error {float(error / size):.2e} > {bound}")


def explanation(case: Case, device: str) -> str:
    """What ``auto`` runs for a case, and why."""
    choice = explain(case.layout(device), tokens=case.tokens, dtype=case.dtype, device=device)
    return f"{choice.form} by {choice.backend}: {choice.reason}"
