"""The definition: each statistic's terms, reduced over each tensor's groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.group_reduce.table import Group, block_of, view_2d

TERMS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "sum_abs_wg": lambda w, g: (w * g).abs(),
    "sum_wg": lambda w, g: w * g,
    "sum_wg_squared": lambda w, g: (w * g).square(),
    "sum_batch_grad_squared": lambda w, g: g.square(),
    "sum_abs_grad": lambda w, g: g.abs(),
    "sum_weight_squared": lambda w, g: w.square(),
    "sum_abs_weight": lambda w, g: w.abs(),
    "max_abs_grad": lambda w, g: g.abs(),
}


def reduce_blocks(terms: Tensor, bm: int, bn: int, largest: bool) -> Tensor:
    """``[rows, cols]`` to one value per ``bm`` by ``bn`` block; partial blocks at the edges."""
    rows, cols = terms.shape
    padded = F.pad(terms, (0, -cols % bn, 0, -rows % bm))
    blocks = padded.reshape(-(-rows // bm), bm, -(-cols // bn), bn)
    return (blocks.amax((1, 3)) if largest else blocks.sum((1, 3))).reshape(-1)


def reduce_ids(terms: Tensor, ids: Tensor, count: int, largest: bool) -> Tensor:
    """``[rows, cols]`` to ``count`` values by row ids or element ids; a negative id is no group."""
    if ids.numel() != terms.numel():
        ids = ids.reshape(-1, 1).expand_as(terms)
    ids = ids.reshape(-1).long()
    kept = ids >= 0
    out = terms.new_zeros(count)
    source = terms.reshape(-1)[kept]
    if largest:
        return out.scatter_reduce_(0, ids[kept], source, "amax")
    return out.index_add_(0, ids[kept], source)


def group_reduce(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    statistics: Sequence[str],
    groups: Sequence[Group],
) -> Tensor:
    """``[statistics, all groups]``, in float32, or float64 if a tensor is float64."""
    tensors = [*weights, *(grads or ())]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    columns: list[Tensor] = []
    for i, (weight, group) in enumerate(zip(weights, groups, strict=True)):
        w = weight.to(dtype).reshape(view_2d(weight.shape))
        g = w if grads is None else grads[i].to(dtype).reshape(w.shape)
        values = []
        for statistic in statistics:
            terms, largest = TERMS[statistic](w, g), statistic == "max_abs_grad"
            if isinstance(group, tuple) and group[0] == "ids":
                ids = group[1].to(terms.device)
                values.append(reduce_ids(terms, ids, group[2], largest))
            else:
                bm, bn, shape = block_of(group, weight.shape, f"groups[{i}]")
                empty = terms.new_zeros(shape).reshape(-1)
                full = terms.numel() > 0
                values.append(reduce_blocks(terms, bm, bn, largest) if full else empty)
        columns.append(torch.stack(values))
    device = weights[0].device if weights else None
    start = torch.zeros(len(statistics), 0, dtype=dtype, device=device)
    return torch.cat([start, *columns], 1)


def update_states(
    sums: Tensor,
    statistics: Sequence[str],
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
) -> None:
    """``running += sums`` (the maximum for a maximum), ``ema = decay·ema + (1-decay)·sums``."""
    if running is not None:
        for i, statistic in enumerate(statistics):
            if statistic == "max_abs_grad":
                torch.maximum(running[i], sums[i].to(running.dtype), out=running[i])
            else:
                running[i] += sums[i]
    if ema is not None:
        ema.mul_(decay).add_(sums, alpha=1.0 - decay)
