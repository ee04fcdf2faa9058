"""Functions that cut a parameter's gradient and moments as a layout cuts the parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sensikernels.layouts import CompactLayout, Layout, full_weight, kept_values, to_device

Entries = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """``new`` takes the place of ``old`` in a model; it will hold ``data``.

    ``entries`` takes a tensor of ``shape``, which is ``old``'s, to one of ``data``'s. ``rows`` and
    ``columns`` do so for a matrix that is 1 wide or 1 high, as factored moments are; None where
    what is kept are not whole rows and columns.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    data: Tensor
    entries: Entries
    rows: Entries | None = None
    columns: Entries | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape that ``old`` has while it is in the model."""
        return self.old.shape


def cut_weight(name: str, old: nn.Parameter, new: nn.Parameter, layout: Layout) -> Move:
    """A dense weight becomes the kept entries of ``layout``."""
    move = partial(Move, name=name, old=old, new=new, data=new.detach())
    if isinstance(layout, CompactLayout):
        return _by_lines(move, _taken(0, layout.rows), _taken(1, layout.columns))

    def entries(full: Tensor) -> Tensor:
        return kept_values(full, to_device(layout, full.device))

    return move(entries=_of_any_type(entries))


def grow_weight(
    name: str, old: nn.Parameter, new: nn.Parameter, data: Tensor, layout: Layout
) -> Move:
    """The kept entries of ``layout`` become a dense weight again, zero elsewhere."""
    move = partial(Move, name=name, old=old, new=new, data=data)
    if isinstance(layout, CompactLayout):
        height, width = layout.shape
        rows, columns = _spread(0, layout.rows, height), _spread(1, layout.columns, width)
        return _by_lines(move, rows, columns)

    def entries(kept: Tensor) -> Tensor:
        return full_weight(kept, to_device(layout, kept.device), compact=False)

    return move(entries=_of_any_type(entries))


def _by_lines(move: Callable[..., Move], rows: Entries, columns: Entries) -> Move:
    return move(rows=rows, columns=columns, entries=lambda whole: columns(rows(whole)))


def cut_bias(name: str, old: nn.Parameter, new: nn.Parameter, rows: Tensor | None) -> Move:
    """A bias keeps its entries at ``rows``, all of them for None."""
    return Move(name=name, old=old, new=new, data=new.detach(), entries=_taken(0, rows))


def grow_bias(
    name: str, old: nn.Parameter, new: nn.Parameter, data: Tensor, rows: Tensor | None
) -> Move:
    """``rows`` of a bias become the whole one again, zero elsewhere."""
    spread = _spread(0, rows, len(data))
    return Move(name=name, old=old, new=new, data=data, entries=spread)


def _taken(axis: int, index: Tensor | None) -> Entries:
    def take(full: Tensor) -> Tensor:
        return full if index is None else full.index_select(axis, index.to(full.device))

    return take


def _spread(axis: int, index: Tensor | None, size: int) -> Entries:
    def spread(kept: Tensor) -> Tensor:
        if index is None:
            return kept
        shape = list(kept.shape)
        shape[axis] = size
        return kept.new_zeros(shape).index_copy(axis, index.long().to(kept.device), kept)

    return spread


def _of_any_type(entries: Entries) -> Entries:
    """``entries`` for tensors of any dtype: those that are not floating are cut as float32."""

    def apply(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return entries(tensor)
        return entries(tensor.float()).to(tensor.dtype)

    return apply
