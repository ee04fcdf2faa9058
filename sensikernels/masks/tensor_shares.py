"""Kept counts by the rank of whole tensors: each coupling keeps a share that its score decides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def tensor_counts(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    room: float,
    multiples: Sequence[int],
    minimums: Sequence[int],
) -> list[int]:
    """How many of its units each coupling keeps so that all cost at most ``room``.

    A coupling's score S is that of its units per cost, Σ score / (cost · units); its share is
    min(1, λ·√S), as scores are squares of gradients. λ is the largest that fits; what is left of
    ``room`` goes to the couplings in the order of their scores, a multiple of units at a time.

    Args:
        scores: of each coupling's units, ``[units]``, none below zero.
        costs: of one unit of each; ``room`` is in the same measure.
        multiples: counts are multiples of these, or all units. minimums: the least counts, which
            must fit.
    """
    sizes = [len(values) for values in scores]
    roots = [
        (float(values.double().sum()) / (cost * size)) ** 0.5
        for values, cost, size in zip(scores, costs, sizes, strict=True)
    ]

    def counts(scale: float) -> list[int]:
        shares = (min(1.0, scale * root) for root in roots)
        return [
            _count(share, size, multiple, minimum)
            for share, size, multiple, minimum in zip(
                shares, sizes, multiples, minimums, strict=True
            )
        ]

    def fits(found: Sequence[int]) -> bool:
        return sum(n * cost for n, cost in zip(found, costs, strict=True)) <= room

    low, high = 0.0, 1.0 / min((root for root in roots if root > 0), default=1.0)
    if fits(counts(high)):
        low = high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(counts(middle)) else (low, middle)
    kept = counts(low)
    for place in sorted(range(len(kept)), key=lambda i: -roots[i]):
        while kept[place] < sizes[place]:
            more = [*kept]
            more[place] = min(kept[place] + multiples[place], sizes[place])
            if not fits(more):
                break
            kept = more
    return kept


def _count(share: float, size: int, multiple: int, minimum: int) -> int:
    """The largest allowed count of at most ``share`` of ``size``, but at least the minimum."""
    least = min(size, -(-minimum // multiple) * multiple)
    wanted = size if share >= 1 else int(share * size) // multiple * multiple
    return max(least, wanted)
