"""The definition of ``subset_adamw`` in plain PyTorch (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels.ops.subset_adamw.item import Clock, Item, Scaling
from sensikernels.ops.subset_adamw.kept import matrix_shape

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = range(5)
"""Columns of the ``hyper`` table."""

_TINY = 1e-300
_ROWS = 2048
_TERMS, _LEAST = 256, 1e-6  # missed moves: no more, no less of the first is added


def update(items: Sequence[Item], hyper: Tensor, scaling: Scaling) -> Tensor:
    """One step over ``items``, in place; returns the gradient's norm, float32 [].

    ``hyper``: float64 [groups, 5] = lr, beta1, beta2, eps, weight_decay. The norm is taken over
    kept entries after the division by ``grad_scale``; ``max_grad_norm`` scales as
    ``torch.nn.utils.clip_grad_norm_`` does.
    """
    max_grad_norm, grad_scale, found_inf = scaling
    unscale = None if grad_scale is None else 1 / grad_scale.double()
    parts = [_kept_gradient(item, unscale) for item in items]
    norm = torch.zeros((), device=hyper.device)
    if max_grad_norm is not None:
        squares = [_square(part) for part in parts]
        norm = torch.stack(squares).sum().sqrt().float() if squares else norm
    clip = None if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for item, part in zip(items, parts, strict=True):
        _update(item, part, clip, hyper[item.group], found_inf)
    return norm


@dataclass(kw_only=True, eq=False)
class _Part:
    """The gradient of the entries to update. Where rows are named, each of ``rows`` has the sum of
    its row: a row that is named twice is written twice, with the same values."""

    grad: Tensor
    rows: Tensor | None = None
    first: Tensor | None = None


def _kept_gradient(item: Item, unscale: Tensor | None) -> _Part:
    grad = item.grad.to(item.exp_avg.dtype).contiguous()
    rows = first = None
    if item.entries is not None:
        rows, grad, first = coalesce(item.entries, grad)
    elif item.masked:
        grad = torch.where(item.layout.flags().to(grad.device), grad, 0)
    else:
        grad = item.layout.gather(grad)
    return _Part(grad=grad if unscale is None else grad * unscale, rows=rows, first=first)


def _square(part: _Part) -> Tensor:
    """Σg², each row once."""
    squares = part.grad.double().square()
    if part.first is not None:
        squares = torch.where(part.first.view(-1, *[1] * (squares.dim() - 1)), squares, 0)
    return squares.sum()


def _take(item: Item, rows: Tensor | None, full: Tensor) -> Tensor:
    if rows is not None:
        return full[rows]
    return full if item.masked else item.layout.gather(full)


def _put(item: Item, rows: Tensor | None, full: Tensor, values: Tensor) -> None:
    if rows is not None:
        full[rows] = values
    elif item.masked:
        full.copy_(values)
    else:
        item.layout.scatter_(full, values)


def _update(
    item: Item, part: _Part, clip: Tensor | None, hyper: Tensor, found_inf: Tensor | None
) -> None:
    raw, rows = part.grad, part.rows

    def live(state: Tensor) -> Tensor:
        if rows is not None:
            return state[rows]
        return state if item.masked else item.layout.live(state)

    lr, beta1, beta2, eps, weight_decay = hyper.unbind()
    go = torch.ones_like(lr) if found_inf is None else (found_inf == 0).to(lr.dtype).squeeze()
    weight = _take(item, rows, item.param) if item.master is None else live(item.master)
    old = weight.to(raw.dtype)
    exp_avg, exp_avg_sq = live(item.exp_avg), live(item.exp_avg_sq)
    _accumulate(item, rows, old, raw, go)

    new, first, second = old, exp_avg, exp_avg_sq
    if rows is not None and item.clock is not None:
        new, first, second = _made_up(
            new, first, second, item.clock, item.clock.rows[rows], hyper, item.step
        )
    grad = raw if clip is None else raw * clip.to(raw.dtype)
    age = item.step.double() + 1
    if item.cohort is not None and item.cohort_start is not None:
        age = (age - item.cohort_start.double())[live(item.cohort).long()]
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
    for state, values in ((item.exp_avg, first), (item.exp_avg_sq, second), (item.master, new)):
        if state is not None and rows is not None:
            state[rows] = values
        elif state is not None:
            live(state).copy_(values)
    _put(item, rows, item.param, new.to(item.param.dtype))
    item.step.add_(go.to(item.step.dtype))
    if item.clock is not None and rows is not None:
        item.clock.now.copy_(torch.where(go != 0, ticked(item.clock.now, hyper), item.clock.now))
        item.clock.rows[rows] = torch.where(go != 0, item.clock.now, item.clock.rows[rows])


def ticked(now: Tensor, hyper: Tensor) -> Tensor:
    """``Clock.now`` after one step more."""
    decay = 1 - hyper[LR] * hyper[WEIGHT_DECAY]
    logs = torch.stack((decay, hyper[BETA1], hyper[BETA2])).clamp(min=_TINY).log()
    return torch.cat((now[:3] + logs, (now[3] + hyper[LR])[None], hyper[LR][None]))


def missed_moves(
    now: Tensor, rows: Tensor, hyper: Tensor, steps: Tensor, terms: int = _TERMS
) -> Tensor:
    """float64 [rows]: how far the steps that a row missed would have moved it, in -m / (√v + ε).

    The sum over them of lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) (β₁/√β₂)ᵏ, each decayed by what came after, with
    betas taken as constant and the learning rate as a straight line. ``steps``: taken so far.
    ``terms``: no row missed more than so many steps.
    """
    log1, log2 = (hyper[beta].clamp(min=_TINY).log() for beta in (BETA1, BETA2))
    k = torch.arange(1, min(terms, _TERMS) + 1, dtype=torch.float64, device=now.device)
    power = (k * (log1 - 0.5 * log2)).exp()
    since = (now - rows)[:, :, None]
    decay, rates = since[:, 0], since[:, 3]
    missed = (since[:, 1] / log1).round()
    start = torch.where(rows[:, 4:] != 0, rows[:, 4:], rates / missed)  # 0: not known
    slope = 2 * (rates / missed - start) / (missed + 1)
    age, later = steps.double() - missed + k, 1 - k * (start + 0.5 * slope * (k + 1)) / rates
    moves = (start + slope * k) * power * (1 - (age * log2).exp()).sqrt() / (1 - (age * log1).exp())
    counts = (k <= missed) & (rates > 0) & (power >= _LEAST)
    return torch.where(counts, moves * (decay * later).exp(), 0).sum(1)


def _made_up(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    clock: Clock,
    rows: Tensor,
    hyper: Tensor,
    steps: Tensor,
    terms: int = _TERMS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments of ``rows`` (their clocks) as they are now."""

    def each(values: Tensor) -> Tensor:
        return values.to(first.dtype).view(-1, *[1] * (first.dim() - 1))

    factors = (clock.now - rows)[:, :3].exp()
    moves = each(missed_moves(clock.now, rows, hyper, steps, terms))
    decayed = weight * each(factors[:, 0]) - moves * (first / (second.sqrt() + hyper[EPS]))
    return decayed, first * each(factors[:, 1]), second * each(factors[:, 2])


def _accumulate(item: Item, rows: Tensor | None, weight: Tensor, grad: Tensor, go: Tensor) -> None:
    high, wide = matrix_shape(item.layout.shape)
    for sums, values in zip(item.sums, ((weight * grad).abs(), grad * grad), strict=True):
        if sums is None:
            continue
        full = torch.zeros(item.layout.shape, dtype=grad.dtype, device=grad.device)
        _put(item, rows, full, values)
        added = full.view(high, wide).sum(1)
        sums += torch.where(go != 0, added, 0).to(sums.dtype)


def coalesce(entries: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums of a sparse gradient; all sizes are those of ``entries``, so nothing is waited for.

    Returns the ``entries`` ascending, [entries, ...] for each the sum of ``values`` over all that
    are equal to it, in the order they have in ``entries`` (float32 or float64), and bool
    [entries], whether it is the first of these.
    """
    rows, order = entries.sort(stable=True)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    place = first.cumsum(0) - 1
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    sums = torch.zeros(values.shape, dtype=wide, device=values.device)
    sums.index_add_(0, place, values[order].to(wide))
    return rows, sums[place], first


def catch_up(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    clock: Clock,
    hyper: Tensor,
    steps: Tensor,
    *,
    terms: int = _TERMS,
) -> None:
    """Bring every row of a table, none of which missed more than ``terms`` steps, up to date with
    ``clock.now``, in place."""
    whole = param if master is None else master
    for at in range(0, len(param), _ROWS):  # the terms of all rows at once would be large
        rows = slice(at, at + _ROWS)
        weight, first, second = _made_up(
            whole[rows].to(exp_avg.dtype),
            exp_avg[rows],
            exp_avg_sq[rows],
            clock,
            clock.rows[rows],
            hyper,
            steps,
            terms,
        )
        whole[rows], exp_avg[rows], exp_avg_sq[rows] = weight.to(whole.dtype), first, second
    if master is not None:
        param.copy_(master)
    clock.rows.copy_(clock.now.expand_as(clock.rows))
