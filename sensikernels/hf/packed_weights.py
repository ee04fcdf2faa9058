"""Several linears of one input as one product: their weights adjacent in one storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels.layouts import PackedLayout
from sensikernels.nn import MaskedLinear, grouped_selective_linear


def plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.linear`` on its own weight and bias and nothing else."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    if type(module) is nn.Linear:
        return True
    return (
        isinstance(module, MaskedLinear)
        and isinstance(module.layout, PackedLayout)
        and module.layout.direct
        and module.activation == "none"
        and module.backend == "auto"
    )


def project(linears: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """Every linear of ``x [tokens, in]``: one product where all are plain, else one each.

    Selective linears share the gradient of their kept entries where they can.
    """
    if not all(plain(linear) and linear.bias is not None for linear in linears):
        return grouped_selective_linear(x, linears)
    weights = [linear.weight for linear in linears]
    y = F.linear(x, joined(weights), joined([linear.bias for linear in linears]))
    return y.split([len(weight) for weight in weights], -1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts)``, without a copy where the parts lie one after the other."""
    if torch.compiler.is_compiling() or not adjacent(parts):
        return torch.cat(list(parts))
    whole: Tensor = _Whole.apply(*parts)  # type: ignore[no-untyped-call]
    return whole


def adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts are contiguous and follow each other in one storage."""
    first, follows = parts[0], 0
    for part in parts:
        follows = follows or first.data_ptr()
        same = part.dtype == first.dtype and part.shape[1:] == first.shape[1:]
        if not same or part.data_ptr() != follows or not part.is_contiguous():
            return False
        follows += part.numel() * part.element_size()
    storages = {part.untyped_storage().data_ptr() for part in parts}
    return len(storages) == 1


@torch.no_grad()
def adjoin(linears: Sequence[Any]) -> None:
    """Move the weights, and the biases, of plain linears into one storage each.

    The Parameters stay the same objects, so optimizers, checkpoints and DDP notice nothing.
    Left alone: linears that are not plain, and parameters of unlike kind or sharded.
    """
    if not all(plain(linear) and linear.bias is not None for linear in linears):
        return
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        kinds = {(type(p), p.dtype, p.device, p.shape[1:]) for p in parts}
        if len(kinds) > 1 or type(parts[0]) is not nn.Parameter or adjacent(parts):
            continue
        whole = torch.cat(parts)
        for part, piece in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.data = piece


class _Whole(torch.autograd.Function):
    """Adjacent tensors seen as one; the gradient's parts are views of one tensor too."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        first = parts[0].detach()
        shape = (sum(ctx.sizes), *first.shape[1:])
        return first.as_strided(shape, first.stride(), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pieces = grads[0].split(ctx.sizes)
        needed = zip(pieces, ctx.needs_input_grad, strict=True)
        return tuple(piece if wanted else None for piece, wanted in needed)
