"""One bit an entry: how masks over single entries travel between ops."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(flags: Tensor) -> Tensor:
    """bool ``[count]`` as uint8 ``[ceil(count / 8)]``, lowest bit first, spare bits zero."""
    padded = flags.new_zeros(-(-flags.numel() // 8) * 8)
    padded[: flags.numel()] = flags
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of ``pack_bits``: bool ``[count]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:count].bool()
