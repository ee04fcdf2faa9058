"""The points of the linear suite, in an order in which any beginning is a sample of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sensikernels.layouts import Layout, layout_of
from sensikernels.masks.mask import Mask

SHAPES = {
    "bert-base": ((768, 3072), (3072, 768), (768, 768)),
    "bert-large": ((1024, 4096), (4096, 1024), (1024, 1024)),
    "minilm": ((384, 1536), (1536, 384), (384, 384)),
}
TOKENS = (1, 128, 1280, 4096, 16384)
PATTERNS = ("rows", "columns", "blocks", "heads")
DENSITIES = (0.5, 0.1, 1.0, 0.25, 0.75)
DIRECTIONS = ("forward+backward", "forward", "grad_weight")
DTYPES = (torch.bfloat16, torch.float32)
BASELINES = (
    "dense",
    "masked-dense",
    "hand-compacted",
    "torch-bsr",
    "compiled-masked",
    "semi-structured",
)
PEERS = ("masked-dense", "compiled-masked", "torch-bsr", "semi-structured")
"""What they take does not depend on the mask, or hardly: raced once a shape, not at each mask."""
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
    candidates: tuple[str, ...] = ("compact", "auto")
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
            mask.grid.to(device),
            mask.block_shape,
            mask.shape,
            compact_input=self.compact,
            compact_output=self.compact,
        )

    @property
    def dense_flops(self) -> float:
        """FLOPs of the dense layer."""
        products = 3 if self.direction == "forward+backward" else 1
        return 2.0 * products * self.tokens * self.in_features * self.out_features

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


def _bsr_case() -> Case:
    """Blocks at few tokens, which torch's own block-sparse format takes in float32 alone."""
    return Case(
        pattern="blocks",
        density=0.25,
        direction="forward",
        candidates=("block-sparse",),
        baselines=("torch-bsr",),
        tokens=128,
        dtype=torch.float32,
        in_features=768,
        out_features=3072,
    )


def quick_cases() -> list[Case]:
    """Bar by bar: compact, blocks, selective rows, and ``auto`` over the densities."""
    cases = []
    for dtype in DTYPES:
        common: dict[str, Any] = dict(tokens=1024, dtype=dtype, in_features=768, out_features=3072)
        cases += [
            Case(
                pattern="rows",
                density=0.1,
                direction="grad_weight",
                candidates=("selective",),
                baselines=("dense",),
                **common,
            ),
            Case(
                pattern="blocks",
                density=0.25,
                candidates=("block-sparse",),
                baselines=("dense", "masked-dense"),
                **common,
            ),
        ]
        up, down, small = SHAPES["bert-base"]
        points = [(up, "rows", d) for d in (0.5, 0.25, 0.1)]
        points += [(down, "columns", d) for d in (0.5, 0.25, 0.1)]
        points += [(small, pattern, 0.5) for pattern in ("rows", "columns")]
        cases += [
            Case(
                pattern=pattern,
                density=density,
                candidates=("compact",),
                baselines=("dense", "hand-compacted"),
                **{**common, "in_features": into, "out_features": out},
            )
            for (into, out), pattern, density in points
        ]
        cases += [
            Case(
                pattern="blocks",
                density=density,
                candidates=("auto",),
                baselines=("dense",),
                direction=direction,
                **{**common, "tokens": tokens},
            )
            for density in (1.0, 0.75, 0.5)
            for tokens, direction in (
                (16, "forward"),
                (16, "forward+backward"),
                (128, "forward+backward"),
                (1024, "forward+backward"),
            )
        ]
    return [*cases, _bsr_case()]


def all_cases(device: str, tokens: Sequence[int] = TOKENS) -> list[Case]:
    """The full table. Every shape, token count, dtype and direction comes once before any comes
    a second time with another mask; many tokens, which cost most, come again less often.
    """
    shapes = [shape for three in zip(*SHAPES.values(), strict=True) for shape in three]
    points = itertools.product(shapes, tokens, DIRECTIONS, DTYPES)
    ranked = [
        (turn * _weight(case) + (case.tokens > 4096) * shapes.index(shape) / len(shapes), case)
        for i, (shape, n, direction, dtype) in enumerate(points)
        for turn, case in enumerate(_masks(shape, n, direction, dtype, first=i, device=device))
    ]
    return [case for _, case in sorted(ranked, key=lambda one: one[0])]


def _weight(case: Case) -> int:
    return 1 if case.tokens < 4096 else 2 if case.tokens == 4096 else 8


def _masks(
    shape: tuple[int, int],
    tokens: int,
    direction: str,
    dtype: torch.dtype,
    *,
    first: int,
    device: str,
) -> Iterator[Case]:
    """Each pattern at each density, from another one on for each ``first``."""
    into, out = shape
    masks = len(PATTERNS) * len(DENSITIES)
    met: set[str] = set()
    for i in range(7 * first, 7 * first + masks):
        pattern = PATTERNS[i % len(PATTERNS)]
        if pattern == "heads" and out % HEAD:
            continue
        own = "block-sparse" if pattern == "blocks" else "compact"
        case = Case(
            pattern=pattern,
            density=DENSITIES[i % len(DENSITIES)],
            in_features=into,
            out_features=out,
            tokens=tokens,
            dtype=dtype,
            direction=direction,
            candidates=("selective",) if direction == "grad_weight" else (own, "auto"),
        )
        peers = [p for p in PEERS if p not in met and why_without(p, case, device) is None]
        met.update(peers)
        yield replace(case, baselines=("dense", "hand-compacted", *peers))


def why_without(baseline: str, case: Case, device: str) -> str | None:
    """The reason why a baseline does not exist for a case; None if it does."""
    forward = case.direction == "forward"
    if baseline in PEERS and case.direction == "grad_weight":
        return "a weight gradient has no mask to multiply by"
    if baseline == "torch-bsr":
        ok = case.pattern == "blocks" and forward and case.dtype == torch.float32
        return None if ok else "torch's BSR linear needs blocks, float32, and has no backward"
    if baseline == "semi-structured":
        ok = device != "cpu" and case.dtype.itemsize == 2 and case.density == 0.5 and forward
        return None if ok else "2:4 needs CUDA, density 0.5, half precision and forward alone"
    if baseline == "hand-compacted" and case.pattern == "blocks":
        return "blocks cannot be compacted by hand"
    return None


def narrowed(cases: Sequence[Case], only: Mapping[str, Sequence[str]]) -> list[Case]:
    """The cases whose facts, ``model``, candidates and baselines are among those ``only`` names.

    Raises:
        ValueError: a name is no fact of a case.
    """
    kept = []
    for case in cases:
        shape = (case.in_features, case.out_features)
        model = next((name for name, shapes in SHAPES.items() if shape in shapes), "")
        facts = {**case.facts(), "model": model}
        lists = {"candidate": case.candidates, "baseline": case.baselines}
        unknown = sorted(set(only) - set(facts) - set(lists))
        if unknown:
            raise ValueError(f"only: expected facts of a row or model, got {', '.join(unknown)}")
        if any(str(facts[name]) not in only[name] for name in only if name in facts):
            continue
        left = {k: tuple(n for n in v if n in only.get(k, v)) for k, v in lists.items()}
        if all(left.values()):
            kept.append(replace(case, candidates=left["candidate"], baselines=left["baseline"]))
    return kept
