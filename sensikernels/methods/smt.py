"""SMT: train the blocks of weights with the largest warm-up gradients (He et al., 2405.15525)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.hf import apply, structure_of
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, head_and_pooler, linears_of, plan_of
from sensikernels.methods.trained import ranking_gradients
from sensikernels.ops.group_reduce import group_reduce
from sensikernels.ops.select_kept import select_kept

BLOCK = 64


@dataclass(kw_only=True, eq=False)
class SMT(Method):
    """Sum gradients, then train the ``share`` of all blocks with the largest mean |sum|.

    With ``warmup`` 0 gradients are summed over the ranking batches, without dropout and without an
    update; the authors sum those of warm-up steps that train everything, which ``warmup``, a share
    of the steps, does too. Blocks of all ``roles`` and layers compete. Everything else but the head
    is frozen then. Weight gradients, their moments and the kept input columns are those of the
    chosen blocks; forward and input gradients are whole.
    """

    name = "smt"
    summary = "the blocks of weights with the largest warm-up gradients train"
    learning_rate = 2e-4
    needs_whole_gradients = True

    warmup: float = option(0.0, "share of the steps that train everything first; 0: sum, no update")
    block: int = option(0, f"side of a block; 0: {BLOCK}, or the half, quarter … that divides")
    share: float = option(0.05, "share of the blocks that trains")
    roles: Sequence[str] = option(("query", "key", "value"), "linears whose blocks compete")
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, "warmup", "a share of the steps in [0, 1)", self.warmup)
        ok = type(self.block) is int and self.block >= 0
        require(ok, "block", "a whole number of at least 0", self.block)
        require(0 < self.share <= 1, "share", "a share in (0, 1]", self.share)
        require(bool(self.roles), "roles", "at least one role of a linear", "none")
        self.roles = tuple(self.roles)

    def begin(self, run: Run) -> None:
        """Check shapes; without a warm-up choose at once."""
        self._side(run)
        if self.warmup_steps(run) == 0:
            self._sums = self._gradients(run)
            self._choose(run)

    def warmup_steps(self, run: Run) -> int:
        """Steps that train everything; one at least if any are asked for."""
        return max(int(self.warmup * run.max_steps), 1) if self.warmup > 0 else 0

    def begin_step(self, run: Run) -> None:
        """Choose once the warm-up is over."""
        if run.plan is None and run.step >= self.warmup_steps(run):
            self._choose(run)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Add up the gradients of the warm-up."""
        if run.plan is not None:
            return
        for name, linear in self._linears(run).items():
            if linear.weight.grad is not None:
                grad = linear.weight.grad.float()
                self._sums[name] = self._sums[name] + grad if name in self._sums else grad.clone()

    def needs_eager(self) -> str | None:
        """Only a warm-up looks at gradients."""
        return f"{self.name} sums the gradients of its warm-up" if self.warmup > 0 else None

    def state(self) -> dict[str, Tensor]:
        """The gradients summed so far."""
        return dict(self._sums)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Freeze at once where the blocks were chosen already."""
        if run.plan is not None:
            apply(run.model, run.plan, optimizer=run.optimizer)
        self._sums = {name: value.clone() for name, value in tensors.items()}

    def _linears(self, run: Run) -> dict[str, Any]:
        return linears_of(run.model, tuple(self.roles))

    def _side(self, run: Run) -> int:
        """The side of a block. Raises UsageError where it does not divide every weight."""
        shapes = [linear.weight.shape for linear in self._linears(run).values()]
        largest = math.gcd(*(size for shape in shapes for size in shape))
        side = self.block or math.gcd(BLOCK, largest)
        require(largest % side == 0, "block", f"a divisor of {largest}, the largest", side)
        return side

    def _gradients(self, run: Run) -> dict[str, Tensor]:
        """Gradients of the weights, summed over the ranking batches of all processes."""
        weights = {f"{n}.weight": linear.weight for n, linear in self._linears(run).items()}
        sums = {
            name.removesuffix(".weight"): torch.zeros_like(w, dtype=torch.float32)
            for name, w in weights.items()
        }
        rows = 0
        with ranking_gradients(run, weights) as gradients:
            for batch in run.batches():
                rows += len(batch["input_ids"])
                for name, grad in gradients(batch).items():
                    sums[name.removesuffix(".weight")] += grad
        seen = sum(run.world.gather(rows))
        require(seen > 0, "batches", "at least one batch to sum gradients of", "none")
        run.world.sum_(sums)
        return sums

    def _choose(self, run: Run) -> None:
        run.plan = run.world.agree(lambda: self._plan(run))
        self._sums = {}
        apply(run.model, run.plan, optimizer=run.optimizer)
        masks = run.plan.update_masks
        kept = sum(int(mask.grid.sum()) for mask in masks.values())
        side = self._side(run)
        run.events.append(
            f"step {run.step}: {kept} blocks of {side} x {side} train, in {len(masks)} linears"
        )

    def _plan(self, run: Run) -> Plan:
        side, names = self._side(run), list(self._linears(run))
        summed = [self._sums[name] for name in names]
        sums = group_reduce(
            summed, None, ("sum_abs_weight",), groups=("block", side, side), names=names
        )
        scores = sums.flat("sum_abs_weight") / side**2
        kept = select_kept(scores, k=max(round(self.share * scores.numel()), 1)).bits.cpu()
        masks: dict[str, Mask] = {}
        for span, weight in zip(sums.spans, summed, strict=True):
            grid = kept[span.offset : span.offset + span.count].view(span.shape)
            if bool(grid.any()):
                shape = (weight.shape[0], weight.shape[1])
                masks[span.name] = Mask.blocks(grid, (side, side), shape)
        return plan_of(
            run,
            self.name,
            Parts(
                whole=head_and_pooler(run.model),
                shares={name: mask.density for name, mask in masks.items()},
            ),
            update_masks=masks,
            trainable=(*(f"{name}.weight" for name in masks), *head_and_pooler(run.model)),
            shapes=structure_of(run.model).shapes(),
            origin=self.options() | {"roles": list(self.roles), "block": side, "step": run.step},
        )
