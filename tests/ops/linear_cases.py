"""Layouts that the linear operators are tested on: every pattern, tails, empty and full masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels.layouts import CompactLayout, Layout, layout_of
from tests.tolerance import assert_close_to_reference

# name: block shape, weight shape; 0 stands for the whole side
GRIDS = {
    "rows": ((1, 0), (50, 37)),
    "columns": ((0, 1), (50, 37)),
    "heads": ((16, 0), (64, 40)),
    "input-heads": ((0, 8), (33, 40)),
    "blocks": ((16, 16), (64, 48)),
    "cut-blocks": ((16, 32), (50, 75)),
    "wide-blocks": ((80, 5), (161, 23)),
    "odd-blocks": ((7, 5), (50, 43)),
}


@pytest.fixture(autouse=True)
def poison_native() -> Iterator[None]:
    """Memory that the compiled kernels allocate past the dispatcher is NaN until written."""
    if extension.available():
        extension.ops().poison(True)
    yield
    if extension.available():
        extension.ops().poison(False)


def grid_of(name: str, keep: str = "some") -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """``(grid, block_shape, shape)``; ``keep``: some, none, one or all of the tiles."""
    block, shape = GRIDS[name]
    block = (block[0] or shape[0], block[1] or shape[1])
    size = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    grid = torch.rand(size, generator=torch.Generator().manual_seed(7)) < 0.4
    if keep != "some":
        grid = torch.full(size, keep == "all")
    if keep == "one":
        grid[-1, -1] = True
    if keep == "some":
        grid[0, 0], grid[-1, -1] = True, not grid[0, -1] or size[1] == 1
    return grid, block, shape


def make_layout(name: str, keep: str = "some", *, compact: str = "") -> Layout:
    """The layout of a named grid; ``compact`` lists ``in`` and ``out``."""
    grid, block, shape = grid_of(name, keep)
    return layout_of(
        grid, block, shape, compact_input="in" in compact, compact_output="out" in compact
    )


def served(layout: Layout) -> tuple[str, ...]:
    """Backends that must agree on the CPU."""
    return ("auto", "native") if not isinstance(layout, CompactLayout) else ("native",)


def check_against_definition(
    run: Callable[..., list[Tensor]], layout: Layout, given: list[Tensor], backend: str, gelu: str
) -> None:
    """``run(layout, given, backend, activation)`` is as near the exact values as the definition."""
    got, same = (run(layout, given, name, gelu) for name in (backend, "reference"))
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    exact = run(layout, double, "reference", gelu)
    for mine, torchs, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(mine, torchs, truth)
