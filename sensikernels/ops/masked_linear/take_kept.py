"""The kept entries of several tensors at once: weight, master copy and moments of a new mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.layouts import CompactLayout, ElementLayout, Layout, kept_values
from sensikernels.ops.common.columns import fused_activation


def take_kept(
    tensors: Sequence[Tensor], layout: Layout, into: Sequence[Tensor] = ()
) -> list[Tensor]:
    """``layouts.kept_values`` of tensors shaped like the weight, whatever their dtypes.

    On a GPU up to four (weight, master copy, two moments) go in one launch.

    Args:
        tensors: each ``[out_features, in_features]``, on the layout's device.
        layout: where the kept entries lie.
        into: tensors of ``layout.values_shape`` to write, one each; a captured graph keeps their
            addresses. By default new ones, or, if all is kept, the tensors themselves.

    Raises:
        UsageError: a shape disagrees.
    """
    for tensor in tensors:
        require(tensor.shape == layout.shape, "tensors", list(layout.shape), list(tensor.shape))
    for target in into:
        ok = target.shape == layout.values_shape
        require(ok, "into", list(layout.values_shape), list(target.shape))
    counts = (len(tensors), len(into))
    require(not into or counts[0] == counts[1], "into", f"{counts[0]} tensors", counts[1])
    whole = isinstance(layout, CompactLayout) and layout.rows is None and layout.columns is None
    element = isinstance(layout, ElementLayout)
    if tensors and not whole and not element and all(fused_activation(t) for t in tensors):
        from sensikernels.ops.common import triton_gather

        most = triton_gather.MOST_TAKEN
        parts = [slice(i, i + most) for i in range(0, len(tensors), most)]
        return [t for p in parts for t in triton_gather.take_kept(tensors[p], layout, into[p])]
    compact = [kept_values(tensor, layout) for tensor in tensors]
    if not into:
        return compact
    with torch.no_grad():
        return [target.copy_(mine) for target, mine in zip(into, compact, strict=True)]
