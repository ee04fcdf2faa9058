"""Shapes of batches, from which their cost follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sensikernels._core.checks import require


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shapes of a pass over some batches, from which its cost follows.

    ``shapes`` counts batches by ``(rows, padded length)``. Linear FLOPs follow ``tokens`` = Σ B·S;
    attention's follow ``squared`` = Σ B·S², and are exact at ``mean_length`` = Σ B·S² / Σ B·S.

    Packed batches: ``packed`` counts them by tokens, rounding included, and ``shapes`` counts
    their sequences as ``(1, length)``; the same formulas hold.
    """

    shapes: Mapping[tuple[int, float], int]
    real_tokens: float
    packed: Mapping[float, int] | None = None

    @classmethod
    def total(cls, parts: Sequence[Geometry]) -> Geometry:
        """The geometry of several passes together, all padded or all packed."""
        shapes: Counter[tuple[int, float]] = Counter()
        packed: Counter[float] = Counter()
        for part in parts:
            shapes.update(part.shapes)
            packed.update(part.packed or {})
        return cls(
            shapes=dict(sorted(shapes.items())),
            real_tokens=sum(part.real_tokens for part in parts),
            packed=dict(sorted(packed.items())) or None,
        )

    @classmethod
    def of_packed(cls, lengths: npt.NDArray[np.int64], tokens: int) -> Geometry:
        """One packed batch: sequences of ``lengths`` in ``tokens`` computed tokens."""
        shapes = count_shapes((1, int(length)) for length in lengths)
        return cls(shapes=shapes, real_tokens=int(lengths.sum()), packed={tokens: 1})

    @classmethod
    def uniform(cls, length: float, attended: float = 1.0) -> Geometry:
        """Sequences of one ``length``; ``attended``: the share of their tokens that are keys."""
        require(length > 0, "length", "a positive number of tokens", length)
        packed = None if attended == 1 else {length: 1}
        return cls(shapes={(1, length): 1}, real_tokens=attended * length, packed=packed)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return sum((self.shapes if self.packed is None else self.packed).values())

    @property
    def rows(self) -> int:
        """Σ B."""
        return sum(rows * count for (rows, _), count in self.shapes.items())

    @property
    def tokens(self) -> float:
        """Σ B·S: tokens computed, padding included."""
        if self.packed is not None:
            return sum(tokens * count for tokens, count in self.packed.items())
        return sum(rows * length * count for (rows, length), count in self.shapes.items())

    @property
    def squared(self) -> float:
        """Σ B·S²."""
        return sum(rows * length**2 * count for (rows, length), count in self.shapes.items())

    @property
    def mean_length(self) -> float:
        """Σ B·S² / Σ B·S, the sequence length to put into a per-token FLOP formula."""
        return self.squared / self.tokens

    @property
    def tokens_per_sequence(self) -> float:
        """Σ B·S / Σ B, the divisor of what runs once per sequence."""
        return self.tokens / self.rows

    @property
    def padding(self) -> float:
        """Share of computed tokens that are padding, 0..1."""
        return 1 - self.real_tokens / self.tokens

    @property
    def attended(self) -> float:
        """Share of computed tokens that are keys of attention: all but what packing rounds up."""
        return 1.0 if self.packed is None else self.real_tokens / self.tokens


def count_shapes(shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, float], int]:
    """The number of times each ``(rows, padded length)`` occurs, in ascending order."""
    return dict(sorted(Counter(shapes).items()))


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    """Computed tokens of a batch, padding included: the size of its ``input_ids``."""
    return batch["input_ids"].numel()
