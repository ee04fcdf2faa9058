"""The definition, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """``(x1 cos - x2 sin, x2 cos + x1 sin)``, taken in float32 at least; ``inverse``: by -sin."""
    half = x.shape[2] // 2
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = (t.to(wide.dtype)[:, None] for t in (cos, sin))
    sin = -sin if inverse else sin
    first, second = wide[..., :half], wide[..., half:]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype).contiguous()
