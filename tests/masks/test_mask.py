"""Masks: patterns, densities and what they reject."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.masks import Mask


@pytest.mark.parametrize(
    ("mask", "pattern", "density"),
    [
        (Mask.rows(torch.tensor([1, 0, 0, 1]).bool(), (4, 6)), "rows", 0.5),
        (Mask.columns(torch.tensor([1, 0, 0]).bool(), (4, 3)), "columns", 1 / 3),
        (Mask.heads(torch.tensor([1, 0]).bool(), (8, 6), head_dim=4), "heads", 0.5),
        (Mask.heads(torch.tensor([1, 0]).bool(), (6, 8), head_dim=4, axis=1), "heads", 0.5),
        (Mask.blocks(torch.eye(2).bool(), (2, 3), (4, 6)), "blocks", 0.5),
        (Mask.elements(torch.eye(4).bool()), "elements", 0.25),
    ],
)
def test_pattern_is_the_tile(mask: Mask, pattern: str, density: float) -> None:
    assert mask.pattern == pattern
    assert mask.density == pytest.approx(density)
    assert mask.dense().shape == mask.shape
    assert pattern in repr(mask)


@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    bm=st.integers(1, 16),
    bn=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_density_counts_cut_tiles(out: int, into: int, bm: int, bn: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(-(-out // bm), -(-into // bn), generator=generator) < 0.5
    mask = Mask(grid=grid, block_shape=(bm, bn), shape=(out, into))
    assert mask.kept_entries == int(mask.dense().sum())
    assert mask.kept.dtype == torch.int32
    assert torch.equal(grid.flatten()[mask.kept.long()], torch.ones(len(mask.kept)).bool())
    assert len(mask.kept) == int(grid.sum())


def test_equal_compares_tiles_and_shape() -> None:
    rows = Mask.rows(torch.ones(4).bool(), (4, 6))
    assert rows.equal(Mask.rows(torch.ones(4).bool(), (4, 6)))
    assert not rows.equal(Mask.columns(torch.ones(6).bool(), (4, 6)))
    assert not rows.equal(Mask.rows(torch.tensor([1, 1, 1, 0]).bool(), (4, 6)))


@pytest.mark.parametrize(
    ("grid", "block", "shape", "message"),
    [
        (torch.ones(2, 2), (2, 2), (4, 4), "grid: expected dtype torch.bool"),
        (torch.ones(2, 3).bool(), (2, 2), (4, 4), r"grid: expected shape \[2, 2\], got \[2, 3\]"),
        (torch.ones(2, 2).bool(), (0, 2), (4, 4), "block_shape: expected two positive sizes"),
        (torch.ones(2, 2).bool(), (2, 2), (4, -1), "shape: expected two positive sizes"),
    ],
)
def test_wrong_shapes_are_named(
    grid: torch.Tensor, block: tuple[int, int], shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Mask(grid=grid, block_shape=block, shape=shape)
