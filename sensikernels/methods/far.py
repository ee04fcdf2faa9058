"""FAR: after some steps the FFN neurons that moved least are frozen (arXiv 2205.01541).

Of the paper the abstract alone was read. How neurons are ranked is a reconstruction, unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.hf import apply, structure_of
from sensikernels.hf.criteria import unit_sums
from sensikernels.masks import Coupling, Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, plan_of
from sensikernels.ops.select_kept import select_kept

MULTIPLE = 16
"""Kept neurons of a layer are a multiple of this, where it has as many: a tensor core's tile."""


@dataclass(kw_only=True, eq=False)
class FAR(Method):
    """Train everything for ``priming`` of the steps, then freeze the FFN neurons that moved least.

    A neuron's rank is the L1 distance that its rows and its column have moved since the start. Of
    each layer the top ``share`` goes on training: rows and biases of the first linear, columns of
    the second. The frozen ones stay to the bit, for which ``SubsetAdamW`` is needed. Saved are
    their weight gradients, their optimizer state, and the activations that the second linear's
    gradient would need; forward and input gradients are whole. All else trains.
    """

    name = "far"
    summary = "after priming, the FFN neurons that moved least are frozen, the rest trains"
    needs_whole_gradients = True  # its layers are swapped in a running training, not in shards

    priming: float = option(0.05, "share of the steps that train everything first")
    share: float = option(0.4, "share of each layer's FFN neurons that goes on training")
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 < self.priming < 1, "priming", "a share in (0, 1)", self.priming)
        require(0 < self.share < 1, "share", "a share in (0, 1)", self.share)

    def begin(self, run: Run) -> None:
        """Remember the weights of the FFN. Raises UsageError for another optimizer."""
        run.subset_adamw("far")
        weights = _weights(run)
        self._start = {name: weight.detach().clone() for name, weight in weights.items()}

    def begin_step(self, run: Run) -> None:
        """Rank and freeze once the priming is over."""
        if run.plan is not None or run.step < priming_steps(run.max_steps, self.priming):
            return
        chosen = run.world.agree(lambda: self._plan(run))
        self._apply(run, chosen)
        run.plan = chosen
        grids = [mask.grid for mask in chosen.update_masks.values() if _is_columns(mask)]
        kept, total = sum(int(grid.sum()) for grid in grids), sum(grid.numel() for grid in grids)
        run.events.append(f"step {run.step}: {kept} of {total} FFN neurons go on training")
        self._start.clear()

    def state(self) -> dict[str, Tensor]:
        """The starting weights of the FFN, while priming."""
        return dict(self._start)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Freeze again where the run had frozen already; else remember where it started."""
        run.subset_adamw("far")
        weights = _weights(run)
        self._start = {name: value.to(weights[name].device) for name, value in tensors.items()}
        if run.plan is not None:
            self._apply(run, run.plan)

    def _plan(self, run: Run) -> Plan:
        couplings = _neurons(run)
        kept = dict(zip((c.name for c in couplings), self._kept(run, couplings), strict=True))
        masks = {
            m.module: _mask(c, m.axis, m.shape, kept[c.name]) for c in couplings for m in c.members
        }
        trainable = tuple(n for n, p in run.model.named_parameters() if p.requires_grad)
        return plan_of(
            run,
            self.name,
            Parts(whole=trainable, shares={name: mask.density for name, mask in masks.items()}),
            update_masks=masks,
            trainable=trainable,
            shapes=structure_of(run.model).shapes(),
            origin=self.options() | {"step": run.step},
        )

    def _kept(self, run: Run, couplings: list[Coupling]) -> list[Tensor]:
        """bool ``[units]`` for every coupling: its neurons that moved most."""
        moved = {
            name: (now.float() - self._start[name].float()).contiguous()
            for name, now in _weights(run, masters=True).items()
        }
        scores = unit_sums(couplings, moved, None, "sum_abs_weight")
        sizes = [c.units for c in couplings]
        segments = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        kept = select_kept(
            torch.cat([scores[c.name] for c in couplings]),
            k=torch.tensor([kept_count(size, self.share) for size in sizes]),
            segments=segments,
            scope="per_segment",
        )
        return list(kept.bits.split(sizes))

    def _apply(self, run: Run, plan: Plan) -> None:
        apply(run.model, plan, optimizer=run.optimizer)
        for name, mask in plan.update_masks.items():
            module: Any = run.model.get_submodule(name)
            if _is_columns(mask) or module.bias is None or not module.bias.requires_grad:
                continue
            rows = mask.kept.to(module.bias.device)
            run.subset_adamw("far").set_kept(module.bias, ("rows", rows))


def priming_steps(max_steps: int, share: float) -> int:
    """Steps that train everything, at least one: weights must have moved to be ranked."""
    return max(int(max_steps * share), 1)


def kept_count(units: int, share: float) -> int:
    """Neurons of a layer that go on training: its share, rounded to a multiple of 16 if it has
    that many, and one multiple at least."""
    step = MULTIPLE if units >= MULTIPLE else 1
    return min(max(round(units * share / step), 1) * step, units)


def _mask(coupling: Coupling, axis: int, shape: tuple[int, int], kept: Tensor) -> Mask:
    if axis == 1:
        return Mask.columns(kept, shape)
    return Mask.rows(kept.repeat(shape[0] // coupling.units), shape)


def _is_columns(mask: Mask) -> bool:
    return mask.block_shape[0] == mask.shape[0]


def _neurons(run: Run) -> list[Coupling]:
    return [c for c in structure_of(run.model).couplings if c.kind == "neurons"]


def _weights(run: Run, *, masters: bool = False) -> dict[str, Tensor]:
    """The weights of the FFN's linears by module name; ``masters``: in the optimizer's float32."""
    modules = (member.module for coupling in _neurons(run) for member in coupling.members)
    weights: dict[str, Any] = {name: run.model.get_submodule(name).weight for name in modules}
    if not masters:
        return weights
    state = run.subset_adamw("far").state
    return {n: state.get(w, {}).get("master", w.detach()) for n, w in weights.items()}
