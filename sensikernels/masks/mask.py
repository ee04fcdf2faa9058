"""A mask is a boolean grid over tiles of a weight; the tile's shape is the pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sensikernels._core.checks import require

PATTERNS = ("rows", "columns", "heads", "blocks", "elements")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """The kept tiles of a weight ``[out_features, in_features]``.

    ``grid`` is bool ``[ceil(out / block_shape[0]), ceil(in / block_shape[1])]``; the last tile of
    a row or column may be cut by the weight's edge.

    Raises:
        UsageError: ``grid`` is not a bool matrix of that size, or a size is not positive.
    """

    grid: Tensor
    block_shape: tuple[int, int]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for argument in ("block_shape", "shape"):
            pair = tuple(int(size) for size in getattr(self, argument))
            require(len(pair) == 2 and min(pair) > 0, argument, "two positive sizes", pair)
            object.__setattr__(self, argument, pair)
        expected = tuple(-(-n // b) for n, b in zip(self.shape, self.block_shape, strict=True))
        require(self.grid.dtype == torch.bool, "grid", "dtype torch.bool", self.grid.dtype)
        got = tuple(self.grid.shape)
        require(got == expected, "grid", f"shape {list(expected)}", f"{list(got)}")

    @classmethod
    def rows(cls, kept: Tensor, shape: tuple[int, int], *, height: int = 1) -> Mask:
        """Keep whole output rows: ``kept`` is bool ``[out_features / height]``."""
        return cls(grid=kept.reshape(-1, 1), block_shape=(height, shape[1]), shape=shape)

    @classmethod
    def columns(cls, kept: Tensor, shape: tuple[int, int], *, width: int = 1) -> Mask:
        """Keep whole input columns: ``kept`` is bool ``[in_features / width]``."""
        return cls(grid=kept.reshape(1, -1), block_shape=(shape[0], width), shape=shape)

    @classmethod
    def heads(cls, kept: Tensor, shape: tuple[int, int], *, head_dim: int, axis: int = 0) -> Mask:
        """Keep attention heads: bands of ``head_dim`` rows (axis 0) or columns (axis 1)."""
        require(axis in (0, 1), "axis", "0 (rows) or 1 (columns)", axis)
        if axis == 0:
            return cls.rows(kept, shape, height=head_dim)
        return cls.columns(kept, shape, width=head_dim)

    @classmethod
    def blocks(cls, grid: Tensor, block_shape: tuple[int, int], shape: tuple[int, int]) -> Mask:
        """Keep tiles of ``block_shape``: ``grid`` is bool, one entry per tile."""
        return cls(grid=grid, block_shape=block_shape, shape=shape)

    @classmethod
    def elements(cls, kept: Tensor) -> Mask:
        """Keep single entries: ``kept`` is bool ``[out_features, in_features]``."""
        require(kept.ndim == 2, "kept", "a matrix", f"{kept.ndim} dimensions")
        return cls(grid=kept, block_shape=(1, 1), shape=(kept.shape[0], kept.shape[1]))

    @property
    def pattern(self) -> str:
        """One of ``PATTERNS``, read off ``block_shape``."""
        (height, width), (out_features, in_features) = self.block_shape, self.shape
        if width == in_features:
            return "rows" if height == 1 else "heads"
        if height == out_features:
            return "columns" if width == 1 else "heads"
        return "elements" if self.block_shape == (1, 1) else "blocks"

    @cached_property
    def kept(self) -> Tensor:
        """Kept tiles as ascending int32 indices into the flattened grid."""
        return self.grid.flatten().nonzero().flatten().to(torch.int32)

    @cached_property
    def kept_entries(self) -> int:
        """Number of weight entries under kept tiles (edge tiles count what they cover)."""
        heights, widths = (
            torch.full((tiles,), block, dtype=torch.int64).index_fill(
                0, torch.tensor([tiles - 1]), size - block * (tiles - 1)
            )
            for tiles, block, size in zip(
                self.grid.shape, self.block_shape, self.shape, strict=True
            )
        )
        return int(((heights[:, None] * widths) * self.grid.cpu()).sum())

    @property
    def density(self) -> float:
        """Kept share of the weight's entries, 0 to 1."""
        return self.kept_entries / (self.shape[0] * self.shape[1])

    def dense(self) -> Tensor:
        """The mask entry by entry: bool ``[out_features, in_features]``."""
        (height, width), (out_features, in_features) = self.block_shape, self.shape
        full = self.grid.repeat_interleave(height, 0).repeat_interleave(width, 1)
        return full[:out_features, :in_features]

    def equal(self, other: Mask) -> bool:
        """Same tiles kept of the same weight shape."""
        same_tiles = (self.block_shape, self.shape) == (other.block_shape, other.shape)
        return same_tiles and torch.equal(self.grid, other.grid)

    def __repr__(self) -> str:
        return f"Mask({self.pattern} of {list(self.shape)}, density={self.density:.3g})"
