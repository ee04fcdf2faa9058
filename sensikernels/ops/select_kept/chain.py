"""The public function ``select_chain``: the layers to train that back-propagation must reach."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.common.checks import described
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.common.lists import native_refusal
from sensikernels.ops.select_kept import native

_NEAR = 1e-9  # of a bucket: a cost so close to a whole number of buckets is that number


def explain_chain(backend: str = "auto") -> Choice:
    """The backend that ``select_chain`` takes, and why."""
    refusals = {"native": native_refusal("select_chain", "cpu"), "reference": None}
    return choose(refusals, backend, reason="the fastest that serves chains")


@torch.no_grad()
def select_chain(
    importance: Tensor,
    t_dw: Tensor,
    t_dy: Tensor,
    budget: float,
    *,
    bins: int = 10_000,
    backend: str = "auto",
) -> Tensor:
    """The most important units of a chain whose backward pass fits ``budget``.

    A unit ``i`` that is trained costs ``t_dw[i]``. Back-propagation comes from the output and
    stops at the lowest unit trained, ``l``, so it costs the sum of ``t_dy[i]`` over ``i >= l``.
    The result maximises the importance kept under

        sum of t_dw[i] over kept i  +  sum of t_dy[i] over i >= l  <=  budget

    by dynamic programming over ``bins`` buckets of the budget (GreenTrainer, arXiv 2309.13192,
    eq. 5). Costs are rounded up to buckets, so the budget holds; where they are whole buckets the
    result is the maximum. Nothing is kept that does not add importance.

    Args:
        importance: ``[n]``, finite, in forward order: unit 0 is nearest to the input.
        t_dw: ``[n]``, finite, >= 0: the cost of the unit's own weight gradient.
        t_dy: ``[n]``, finite, >= 0: the cost of bringing the gradient to the unit's output.
        budget: >= 0, in the unit of the costs, the forward pass not included.
        bins: >= 1. Memory is ``n * (bins + 1)`` bytes.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        bool ``[n]`` on the CPU: a plan for the host to act on.

    Raises:
        UsageError: arguments that do not fit.
    """
    columns = []
    for name, t in (("importance", importance), ("t_dw", t_dw), ("t_dy", t_dy)):
        require(t.dim() == 1, name, "a 1-D tensor", f"{t.dim()} dimensions")
        require(not t.is_complex() and not t.is_meta, name, "real values", described(t))
        fits = t.shape == importance.shape
        require(fits, name, f"shape {tuple(importance.shape)}", tuple(t.shape))
        values = t.detach().cpu().double().contiguous()
        require(bool(values.isfinite().all()), name, "finite values", "others")
        sound = name == "importance" or not bool((values < 0).any())
        require(sound, name, "values >= 0", "a negative one")
        columns.append(values)
    require(0 <= budget < float("inf"), "budget", "a finite number >= 0", budget)
    require(bins >= 1, "bins", "a number >= 1", bins)
    chosen = explain_chain(backend).backend
    value, own, down = columns
    passed = down.flip(0).cumsum(0).flip(0)
    run = native.select_chain if chosen == "native" else chain_reference
    return run(value, _buckets(own, budget, bins), _buckets(passed, budget, bins), bins)


def _buckets(cost: Tensor, budget: float, bins: int) -> Tensor:
    """Costs in buckets, rounded up; ``bins + 1`` for what no budget pays."""
    if budget == 0:
        return (cost > 0).long() * (bins + 1)
    return (cost * (bins / budget) - _NEAR).ceil().clamp(0, bins + 1).long()


def chain_reference(value: Tensor, own: Tensor, passed: Tensor, bins: int) -> Tensor:
    """The definition: bool ``[n]`` of units, by costs in whole buckets.

    ``best[t]`` is the highest importance of units above ``i`` whose own cost is at most ``t``;
    the lowest unit kept is tried at every place.
    """
    n = value.numel()
    worth, costs, reach = value.numpy(), own.numpy(), passed.numpy()
    best = np.zeros(bins + 1)
    took = np.zeros((n, bins + 1), bool)
    top, lowest, left = 0.0, -1, 0
    for i in range(n - 1, -1, -1):
        room = bins - int(reach[i]) - int(costs[i])
        if room >= 0 and best[room] + worth[i] > top:
            top, lowest, left = best[room] + worth[i], i, room
        if costs[i] <= bins:
            with_it = best[: bins + 1 - costs[i]] + worth[i]
            took[i, costs[i] :] = with_it > best[costs[i] :]
            best[costs[i] :] = np.maximum(best[costs[i] :], with_it)
    kept = torch.zeros(n, dtype=torch.bool)
    if lowest >= 0:
        kept[lowest] = True
        for i in range(lowest + 1, n):
            if took[i, left]:
                kept[i] = True
                left -= int(costs[i])
    return kept
