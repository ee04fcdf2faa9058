"""Philox4x32-10 in plain PyTorch integers."""

from __future__ import annotations

import torch
from torch import Tensor

LANES, TILE = 16, 128
DRAWS = 1 << 16
_WORD = 0xFFFFFFFF


def philox(seed: Tensor, counters: Tensor) -> list[Tensor]:
    """Four 32-bit words (as int64) per 64-bit counter, key = ``seed`` (Salmon et al., SC 2011)."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = counters & _WORD, (counters >> 32) & _WORD
    c2 = c3 = torch.zeros_like(counters)
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 by 32 bit product, without overflowing int64."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    carried = high + (low >> 16)
    return (carried >> 16) & _WORD, ((carried & 0xFFFF) << 16) | (low & 0xFFFF)


def draws(seed: Tensor, n: int) -> Tensor:
    """int64 ``[n]`` in [0, 65536): element 128·t + 64·h + 16·w + lane of counter 16·t + lane."""
    tiles = -(-n // TILE)
    counters = torch.arange(tiles * LANES, device=seed.device).view(tiles, 1, LANES)
    words = torch.cat(philox(seed, counters), 1)
    return torch.stack([words & 0xFFFF, words >> 16], 1).flatten()[:n]


def dropped(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``x · 65536 / threshold`` where the element's draw is below ``threshold``, else 0."""
    kept = draws(seed, x.numel()).view(x.shape) < threshold
    scale = DRAWS / threshold if threshold else 0.0
    return torch.where(kept, x * scale, x.new_zeros(()))
