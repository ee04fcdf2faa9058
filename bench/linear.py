"""Masked and selective linears against what else a user could run, each gated by correctness."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels.bench.roofline import achieved, roof
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import interleave, time_is_up
from sensikernels.layouts import Layout, PackedLayout, layout_of, pack, unpack
from sensikernels.masks.mask import Mask
from sensikernels.nn import MaskedLinear
from sensikernels.ops.masked_linear import masked_linear
from sensikernels.ops.selective_linear import selective_linear

SHAPES = {
    "bert-base": ((768, 768), (768, 3072), (3072, 768)),
    "bert-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "minilm": ((384, 384), (384, 1536), (1536, 384)),
}
TOKENS = (1, 128, 1280, 4096, 16384)
CPU_TOKENS = (1, 128, 1280, 4096)
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)
BASELINES = ("dense", "masked-dense", "hand-packed", "torch-bsr", "compiled-masked",
             "semi-structured")  # fmt: skip
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

    def mask(self) -> Mask:
        """The kept tiles: a random choice that depends on nothing but the case."""
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
        return Mask(grid=grid.view(size), block_shape=block, shape=shape)

    @property
    def compact(self) -> bool:
        """Narrow as in a planned model: outputs of rows, inputs of columns."""
        return self.pattern != "blocks" and self.direction != "grad_weight"

    def layout(self, device: str) -> Layout:
        """The mask as the operators take it."""
        mask = self.mask()
        return layout_of(
            mask.grid.to(device), mask.block_shape, mask.shape,
            compact_input=self.compact, compact_output=self.compact,
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


def run(
    *,
    device: str,
    quick: bool,
    progress: Callable[[str], object],
    rounds: int | None = None,
    seconds: float | None = None,
    tokens: Sequence[int] | None = None,
    done: Sequence[Row] = (),
) -> list[Row]:
    """Every case's candidates against its baselines, interleaved; fp32 at ``medium`` precision.

    ``progress`` is told each case, and why a baseline is missing. ``quick`` covers each bar in
    under a minute. The full table takes hours on a CPU: ``seconds`` ends it early, ``tokens``
    narrows it (a CPU leaves out 16384), and cases of ``done`` rows are not measured again.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    start, rows = time.perf_counter(), list(done)
    most = QUICK_SECONDS if quick else seconds
    known = {(one.case, one.dtype, one.direction) for one in done}
    cases = quick_cases() if quick else all_cases(device)
    wanted = tokens or (CPU_TOKENS if device == "cpu" and not quick else None)
    cases = [case for case in cases if wanted is None or case.tokens in wanted]
    try:
        for i, case in enumerate(cases):
            left = None if most is None else most - (time.perf_counter() - start)
            facts = case.facts()
            if (facts["case"], facts["dtype"], facts["direction"]) in known:
                continue
            if time_is_up() or (left is not None and left < 0 and not quick):
                progress(f"linear: stopped before case {i + 1} of {len(cases)}")
                break
            progress(f"linear {i + 1}/{len(cases)}: {facts['case']} {facts['dtype']}")
            rows += measure(
                case, device, rounds=rounds or (5 if quick else 15),
                left=left if quick else None, progress=progress,
            )  # fmt: skip
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
                 direction=direction, **{**common, "tokens": tokens})
            for density in (1.0, 0.75, 0.5)
            for tokens, direction in ((16, "forward"), (16, "forward+backward"),
                                      (128, "forward+backward"), (1024, "forward+backward"))
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


def measure(
    case: Case,
    device: str,
    *,
    rounds: int,
    left: float | None,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Gate, then time; a baseline that does not exist for the case is left out, with its reason."""
    contestants = _contestants(case, device)
    for baseline in case.baselines:
        if baseline not in contestants:
            progress(f"  without {baseline}: {why_without(baseline, case, device)}")
    share = None if left is None else max(0.3, min(2.5, left / 12))
    if case.tokens <= 128:  # short calls: more of them, in no more time
        rounds, share = 8 * rounds, min(share or 1.0, 0.5)
    times = interleave(
        contestants, rounds=rounds, warmup=1 if left is not None else 2, device=device,
        budget_s=share,
    )  # fmt: skip
    peak, work = roof(device, case.dtype), _work(case)
    return [
        row(
            candidate_time=times[candidate],
            baseline_time=times[baseline],
            candidate=candidate,
            baseline=baseline,
            extra=achieved(work, times[candidate], *peak),
            **case.facts(),
        )
        for candidate, baseline in itertools.product(case.candidates, case.baselines)
        if candidate in times and baseline in times
    ]


def _work(case: Case) -> tuple[float, float]:
    """FLOPs, and bytes of x, kept weights and y, each moved once per product."""
    density, products = case.mask().density, 3 if case.direction == "forward+backward" else 1
    kept = density * case.in_features * case.out_features
    rows = density if case.pattern in ("rows", "heads") else 1.0
    columns = density if case.pattern == "columns" else 1.0
    moved = case.tokens * (columns * case.in_features + rows * case.out_features) + kept
    return 2 * case.tokens * kept * products, moved * case.dtype.itemsize * products


def why_without(baseline: str, case: Case, device: str) -> str:
    """Why a baseline does not exist for a case."""
    if baseline == "torch-bsr":
        return "torch's BSR linear has no backward, no bfloat16 on a CPU, and needs blocks"
    if baseline == "semi-structured":
        return "2:4 needs CUDA, density 0.5, half precision and forward alone"
    if baseline == "hand-packed":
        return f"{case.pattern} cannot be packed by hand"
    return f"not built for {device}"


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
    packed = isinstance(layout, PackedLayout)
    rows, columns = (layout.rows, layout.columns) if packed else (None, None)
    read = x if columns is None else x[:, columns.long()]
    narrow_bias = bias if rows is None else bias[rows.long()]
    narrow_dy = dy if rows is None else dy[:, rows.long()]
    values, mask = pack(weight, layout), unpack(torch.ones_like(pack(weight, layout)), layout)
    backward = case.direction == "forward+backward"

    def module() -> Callable[[], object]:
        """What a user meets: without gradients it may keep a dense weight."""
        if backward:
            return mine("auto")
        whole = nn.Linear(case.in_features, case.out_features, device="meta")
        whole.weight, whole.bias = nn.Parameter(weight), nn.Parameter(bias)
        layer = MaskedLinear.from_linear(
            whole, case.mask(), compact_input=case.compact, compact_output=case.compact
        )
        return torch.no_grad()(lambda: layer.forward(read))

    def mine(backend: str) -> Callable[[], object]:
        def linear(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return masked_linear(x, values, layout, bias, backend=backend)

        return _step(linear, read, values, narrow_bias, narrow_dy, backward)

    def masked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight * mask, bias)

    named = "native" if x.is_cpu else "triton"
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "auto": module,
        "packed": lambda: mine("auto"),
        "block-sparse": lambda: mine(named),
        # A copy of its own, like everybody's: one that many read is warmer in the cache.
        "dense": lambda: _step(F.linear, x, weight.clone(), bias, dy, backward),
        "masked-dense": lambda: _step(masked, x, weight, bias, dy, backward),
        "compiled-masked": lambda: _step(
            lambda x, w, b: _compiled()(x, w, mask, b), x, weight, bias, dy, backward
        ),
    }
    if isinstance(layout, PackedLayout):
        makers["hand-packed"] = lambda: _step(
            F.linear, read, values.clone(), narrow_bias, narrow_dy, backward
        )
    elif not backward and case.dtype == torch.float32:
        sparse = (weight * mask).to_sparse_bsr((case.block, case.block))
        makers["torch-bsr"] = lambda: lambda: F.linear(x, sparse, bias)
    if x.is_cuda and case.dtype.itemsize == 2 and case.density == 0.5 and not backward:
        makers["semi-structured"] = lambda: _semi_structured(x, weight, bias)
    expected = F.linear(x, weight * mask, bias)
    with torch.no_grad():
        _gate(
            masked_linear(read, values, layout, narrow_bias),
            expected if rows is None else expected[:, rows.long()],
            case,
        )
    return {name: makers[name]() for name in case.candidates + case.baselines if name in makers}


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One graph for all shapes: a new one for each would soon be refused, and run eagerly."""

    def masked(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight * mask, bias)

    return torch.compile(masked, dynamic=True)


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
    groups = weight.view(-1, 4)
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1.0)
    sparse = torch.sparse.to_sparse_semi_structured(weight * kept.view_as(weight))
    return torch.no_grad()(lambda: F.linear(x, sparse, bias))


def _gate(got: Tensor, expected: Tensor, case: Case) -> None:
    """No timing of a wrong result: RMS of the difference against RMS of the result."""
    error = (got.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    # A GPU's float32 products are TF32's.
    bound = 0.02 if case.dtype == torch.bfloat16 else 2e-3 if got.is_cuda else 1e-4
    if got.numel() and not error <= bound * size:
        raise AssertionError(f"{case}: relative RMS error {float(error / size):.2e} > {bound}")
