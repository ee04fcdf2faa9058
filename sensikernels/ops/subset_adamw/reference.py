"""The definition of ``subset_adamw`` in plain PyTorch (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels.ops.subset_adamw.item import Clock, Item
from sensikernels.ops.subset_adamw.kept import matrix_shape

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = range(5)
"""Columns of the ``hyper`` table."""

_TINY = 1e-300


def update(
    items: Sequence[Item],
    hyper: Tensor,
    *,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One step over ``items``, in place; returns the gradient's norm, float32 [].

    ``hyper``: float64 [groups, 5] = lr, beta1, beta2, eps, weight_decay. Gradients are divided by
    ``grad_scale``; the norm is taken over kept entries after that. With a nonzero ``found_inf``
    nothing changes. ``max_grad_norm`` scales as ``torch.nn.utils.clip_grad_norm_`` does.
    """
    unscale = None if grad_scale is None else 1 / grad_scale.double()
    grads = [_kept_gradient(item, unscale) for item in items]
    norm = torch.zeros((), device=hyper.device)
    if max_grad_norm is not None:
        squares = [grad.double().square().sum() for grad in grads]
        norm = torch.stack(squares).sum().sqrt().float() if squares else norm
    clip = None if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for item, grad in zip(items, grads, strict=True):
        _update(item, grad, clip, hyper[item.group], found_inf)
    return norm


def _rows(item: Item) -> Tensor:
    """Indices of the touched rows: those of ``grad`` whose entry is not -1."""
    assert item.touched is not None
    return item.touched[item.touched >= 0].long()


def _take(item: Item, full: Tensor) -> Tensor:
    if item.touched is not None:
        return full[_rows(item)]
    return full if item.masked else item.layout.gather(full)


def _put(item: Item, full: Tensor, values: Tensor) -> None:
    if item.touched is not None:
        full[_rows(item)] = values
    elif item.masked:
        full.copy_(values)
    else:
        item.layout.scatter_(full, values)


def _kept_gradient(item: Item, unscale: Tensor | None) -> Tensor:
    grad = item.grad.to(item.exp_avg.dtype).contiguous()
    if item.touched is not None:
        grad = grad[item.touched >= 0]
    elif item.masked:
        grad = torch.where(item.layout.flags().to(grad.device), grad, 0)
    else:
        grad = item.layout.gather(grad)
    return grad if unscale is None else grad * unscale


def _update(
    item: Item, raw: Tensor, clip: Tensor | None, hyper: Tensor, found_inf: Tensor | None
) -> None:
    """``raw``: the unclipped gradient of the entries to update."""
    lr, beta1, beta2, eps, weight_decay = hyper.unbind()
    go = torch.ones_like(lr) if found_inf is None else (found_inf == 0).to(lr.dtype).squeeze()
    weight = _take(item, item.param) if item.master is None else _state(item, item.master)
    old = weight.to(raw.dtype)
    exp_avg, exp_avg_sq = _state(item, item.exp_avg), _state(item, item.exp_avg_sq)
    _accumulate(item, old, raw, go)

    new, first, second = old, exp_avg, exp_avg_sq
    if item.touched is not None and item.clock is not None:
        missed = (item.clock.now - item.clock.rows[_rows(item)]).exp().to(raw.dtype)
        missed = missed.view(-1, 3, *[1] * (raw.dim() - 1))
        new, first, second = new * missed[:, 0], first * missed[:, 1], second * missed[:, 2]
    grad = raw if clip is None else raw * clip.to(raw.dtype)
    age = item.step.double() + 1
    if item.cohort is not None and item.cohort_start is not None:
        age = (age - item.cohort_start.double())[item.cohort.long()]
    step_size = (lr / (1 - beta1**age)).to(raw.dtype)
    root = (1 - beta2**age).sqrt().to(raw.dtype)
    first = first + (grad - first) * (1 - beta1)
    second = second * beta2 + grad * grad * (1 - beta2)
    new = new * (1 - lr * weight_decay)
    new = new - step_size * (first / (second.sqrt() / root + eps))

    new, first, second = (
        torch.where(go != 0, after, before)
        for after, before in ((new, old), (first, exp_avg), (second, exp_avg_sq))
    )
    for full, values in (
        (item.exp_avg, first), (item.exp_avg_sq, second), (item.master, new)
    ):  # fmt: skip
        if full is not None and item.touched is not None:
            full[_rows(item)] = values
        elif full is not None:
            full.copy_(values)
    _put(item, item.param, new.to(item.param.dtype))
    item.step.add_(go.to(item.step.dtype))
    if item.clock is not None and item.touched is not None:
        item.clock.now.add_(clock_tick(hyper) * go)
        item.clock.rows[_rows(item)] = torch.where(
            go != 0, item.clock.now, item.clock.rows[_rows(item)]
        )


def _state(item: Item, full: Tensor) -> Tensor:
    return full if item.touched is None else full[_rows(item)]


def clock_tick(hyper: Tensor) -> Tensor:
    """What one step adds to ``Clock.now``: float64 [3]."""
    decay = 1 - hyper[LR] * hyper[WEIGHT_DECAY]
    return torch.stack((decay, hyper[BETA1], hyper[BETA2])).clamp(min=_TINY).log()


def _accumulate(item: Item, weight: Tensor, grad: Tensor, go: Tensor) -> None:
    rows, columns = matrix_shape(item.layout.shape)
    for sums, values in zip(item.sums, ((weight * grad).abs(), grad * grad), strict=True):
        if sums is None:
            continue
        full = torch.zeros(item.layout.shape, dtype=grad.dtype, device=grad.device)
        _put(item, full, values)
        added = full.view(rows, columns).sum(1)
        sums += torch.where(go != 0, added, 0).to(sums.dtype)


def coalesce(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and row sums of a sparse COO gradient, without a host synchronisation.

    Returns int32 [entries], ascending distinct rows followed by -1, and float32 or float64
    [entries, ...], their gradients, each summed in the order the entries have in ``grad``.
    """
    rows, order = grad._indices()[0].sort(stable=True)
    values = grad._values()[order]
    heads = torch.ones_like(rows, dtype=torch.bool)
    heads[1:] = rows[1:] != rows[:-1]
    place = heads.cumsum(0) - 1
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    summed = torch.zeros(values.shape, dtype=wide, device=values.device)
    summed.index_add_(0, place, values.to(wide))
    touched = torch.full(rows.shape, -1, dtype=torch.int32, device=rows.device)
    touched[place] = rows.int()
    return touched, summed


def catch_up(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, clock: Clock
) -> None:
    """Bring every row of a table up to date with ``clock.now``, in place."""
    factors = (clock.now - clock.rows).exp().to(exp_avg.dtype)
    factors = factors.view(-1, 3, *[1] * (param.dim() - 1))
    weight = param if master is None else master
    current = (weight.to(exp_avg.dtype) * factors[:, 0]).to(weight.dtype)
    weight.copy_(current)
    if master is not None:
        param.copy_(current)
    exp_avg.mul_(factors[:, 1])
    exp_avg_sq.mul_(factors[:, 2])
    clock.rows.copy_(clock.now.expand_as(clock.rows))
