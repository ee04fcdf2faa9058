"""Packed tokens to padded batches and back, without reading ``cu_seqlens`` on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Padded:
    """The places of the tokens of ``n`` sequences, each padded to ``length``.

    ``rows [n, length]``: the packed row of each place (some row where there is none);
    ``inside [n, length]``: whether there is one.
    """

    rows: Tensor
    inside: Tensor

    def gather(self, packed: Tensor) -> Tensor:
        """``[tokens, heads, size]`` to ``[n, heads, length, size]``, zero where no token is."""
        if packed.shape[0] == 0:
            n, length = self.rows.shape
            # An empty sum keeps the result differentiable.
            return packed.new_zeros(n, packed.shape[1], length, packed.shape[2]) + packed.sum()
        padded = packed.index_select(0, self.rows.flatten())
        padded = torch.where(self.inside.flatten()[:, None, None], padded, 0.0)
        return padded.view(*self.rows.shape, *packed.shape[1:]).transpose(1, 2)

    def scatter(self, padded: Tensor, packed: Tensor) -> None:
        """Write ``padded`` into ``packed [tokens + 1, heads, size]``; padding to its last row."""
        rows = torch.where(self.inside, self.rows, packed.shape[0] - 1)
        packed.index_copy_(0, rows.flatten(), padded.transpose(1, 2).flatten(0, 1))


@dataclass(frozen=True, kw_only=True)
class Whole:
    """``n`` sequences of ``length`` tokens each, one after another from row 0: only views."""

    n: int
    length: int

    def view(self, packed: Tensor) -> Tensor:
        """``[n, heads, length, size]`` of ``[tokens, heads, size]``."""
        shape = (self.n, self.length, *packed.shape[1:])
        return packed[: self.n * self.length].view(shape).transpose(1, 2)

    gather = view

    def scatter(self, padded: Tensor, packed: Tensor) -> None:
        """Write ``padded`` into the first rows of ``packed``."""
        self.view(packed).copy_(padded)


def pad(starts: Tensor, ends: Tensor, length: int, tokens: int) -> Padded:
    """Places of the sequences from row ``starts`` to ``ends``, ``[n]`` each."""
    at = torch.arange(length, device=starts.device)
    rows = starts[:, None].long() + at
    inside = rows < ends[:, None]
    return Padded(rows=rows.clamp(max=max(tokens - 1, 0)), inside=inside)


def unpad(padded: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[sequences, heads, length, size]`` to ``[tokens, heads, size]``, zero in the padding."""
    row = torch.arange(tokens, device=padded.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    sequences, _, length, _ = padded.shape
    used = row < cu_seqlens[-1]
    if sequences == 0 or length == 0:
        # An empty sum keeps the result differentiable.
        return padded.new_zeros(tokens, padded.shape[1], padded.shape[3]) + padded.sum()
    sequence = sequence.clamp(max=sequences - 1)
    place = (row - cu_seqlens[sequence]).clamp(max=length - 1)
    packed = padded.transpose(1, 2)[sequence, place.long()]
    return torch.where(used[:, None, None], packed, 0.0)
