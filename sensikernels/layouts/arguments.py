"""Layouts as lists of integers and tensors, which an operator's schema can carry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.layouts.checks import BLOCK_TENSORS
from sensikernels.layouts.kinds import BlockLayout, CompactLayout

Carried = CompactLayout | BlockLayout


def to_arguments(layout: Carried) -> tuple[list[int], list[Tensor]]:
    """The layout as an operator's schema can carry it; ``from_arguments`` reads it back."""
    ends = [layout.rows, layout.columns]
    index = [t for t in ends if t is not None]
    flags = [layout.compact_input, layout.compact_output, *(t is not None for t in ends)]
    sizes = [layout.kept_entries, *layout.shape, *map(int, flags)]
    if isinstance(layout, BlockLayout):
        sizes += layout.block_shape
        index += [getattr(layout, name) for name in BLOCK_TENSORS]
    return sizes, index


def from_arguments(sizes: Sequence[int], index: Sequence[Tensor]) -> Carried:
    """The inverse of ``to_arguments``, checked.

    Raises:
        UsageError: not what ``to_arguments`` writes, or index tensors that are no layout.
    """
    layout = _made(sizes, index)
    layout.check()
    return layout


def _made(sizes: Sequence[int], index: Sequence[Tensor]) -> Carried:
    ok = len(sizes) in (7, 9) and all(flag in (0, 1) for flag in sizes[3:7])
    require(ok, "sizes", "7 or 9 integers, the 4 after the third 0 or 1", list(sizes))
    count = sum(sizes[5:7]) + (len(BLOCK_TENSORS) if len(sizes) == 9 else 0)
    require(len(index) == count, "index", f"{count} tensors for these sizes", len(index))
    kept_entries, out_features, in_features, *flags = sizes[:7]
    rest = iter(index)
    ends = [next(rest) if given else None for given in flags[2:]]
    shape, (rows, columns) = (out_features, in_features), ends
    compact_input, compact_output = bool(flags[0]), bool(flags[1])
    if len(sizes) == 7:
        compact = CompactLayout(
            shape=shape,
            rows=rows,
            columns=columns,
            compact_input=compact_input,
            compact_output=compact_output,
        )
        ok = compact.kept_entries == kept_entries
        require(ok, "sizes", f"{compact.kept_entries} kept entries", kept_entries)
        return compact
    return BlockLayout(
        shape=shape,
        block_shape=(sizes[7], sizes[8]),
        kept_entries=kept_entries,
        rows=rows,
        columns=columns,
        compact_input=compact_input,
        compact_output=compact_output,
        **dict(zip(BLOCK_TENSORS, rest, strict=True)),
    )
