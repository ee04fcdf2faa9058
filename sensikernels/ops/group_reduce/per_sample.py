"""Squares of per-sample weight gradients, from activations and output gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.group_reduce.reference import reduce_blocks
from sensikernels.ops.group_reduce.table import Group, block_of


def gram_is_cheaper(tokens: int, in_features: int, out_features: int) -> bool:
    """``T²(in + out)`` against ``T·in·out`` multiply-adds per sample."""
    return tokens * (in_features + out_features) < in_features * out_features


@torch.no_grad()
def per_sample_grad_squared(x: Tensor, grad_y: Tensor, *, groups: Group = "element") -> Tensor:
    r"""``sum_grad_squared`` of a linear layer's weight: :math:`\sum_b (\sum_t g_{bt} x_{bt}^T)^2`.

    The diagonal empirical Fisher of BackPACK's ``SumGradSquared``, exact with a token axis. It is
    neither ``sum_batch_grad_squared`` (the square of the sum over samples) nor the factorised
    :math:`\sum_{bt} g_{bt}^2 x_{bt}^2`, which is right only without a token axis. Gradients of a
    mean loss are ``1/B`` of per-sample ones: scale by ``B²``.

    At most one sample's weight gradient exists at a time; for ``"tensor"``, ``"row"``,
    ``"column"`` and row or column heads none does where the token Gram matrices
    ``x_b x_bᵀ`` and ``g_b g_bᵀ`` cost less.

    Args:
        x: layer inputs ``[B, T, in_features]``, or ``[B, in_features]`` without a token axis.
            Ones of shape ``[B, T, 1]`` give the bias.
        grad_y: gradients of the layer's outputs ``[B, T, out_features]`` (zero at padding).
        groups: ``"element"`` or any rectangular group of :func:`group_reduce`, over
            ``[out_features, in_features]``.

    Returns:
        float32 (float64 for float64 inputs): ``[out_features, in_features]``, or one per group.

    Raises:
        UsageError: shapes that do not pair up, or a group that does not fit.
    """
    ok = x.dim() in (2, 3) and grad_y.dim() == x.dim() and x.shape[:-1] == grad_y.shape[:-1]
    require(ok, "grad_y", f"shape {(*x.shape[:-1], 'out_features')}", tuple(grad_y.shape))
    for name, t in (("x", x), ("grad_y", grad_y)):
        require(
            t.is_floating_point() and t.device == x.device,
            name,
            f"a floating tensor on {x.device}",
            f"{t.dtype} on {t.device}",
        )
    in_features, out_features = x.shape[-1], grad_y.shape[-1]
    shape = (out_features, in_features)
    if groups == "element":
        groups = ("block", 1, 1)
    bm, bn, result = block_of(groups, shape, "groups")
    wide = torch.float64 if torch.float64 in (x.dtype, grad_y.dtype) else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, grad_y = x.to(wide), grad_y.to(wide)
        if x.dim() == 2:
            squares = grad_y.square().t() @ x.square()
            return reduce_blocks(squares, bm, bn, largest=False).view(result)
        cheap = gram_is_cheaper(x.shape[1], in_features, out_features)
        if cheap and bn >= in_features:
            rows = ((x @ x.mT) @ grad_y).mul_(grad_y).sum((0, 1))
            return reduce_blocks(rows.unsqueeze(1), bm, 1, largest=False).view(result)
        if cheap and bm >= out_features:
            columns = ((grad_y @ grad_y.mT) @ x).mul_(x).sum((0, 1))
            return reduce_blocks(columns.unsqueeze(0), 1, bn, largest=False).view(result)
        squares = x.new_zeros(shape)
        for x_b, g_b in zip(x, grad_y, strict=True):
            gradient = g_b.t() @ x_b
            squares.addcmul_(gradient, gradient)
        return reduce_blocks(squares, bm, bn, largest=False).view(result)
