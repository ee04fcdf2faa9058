"""SIFT: the entries with the largest gradients of the first step train (arXiv 2312.11875)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensikernels._core.bits import unpack_bits
from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import apply, structure_of
from sensikernels.masks import Mask, Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, linears_of, plan_of
from sensikernels.methods.trained import head_of
from sensikernels.nn import SelectiveLinear
from sensikernels.ops.select_kept import select_elements

ROLES = ("query", "key", "value", "attention_output", "intermediate", "output")


@dataclass(kw_only=True, eq=False)
class SIFT(Method):
    """Of each linear of ``roles`` the ``int(share·N) + 1`` entries with the largest |g| train.

    g is the gradient of the first step, whose update is left out, as in the authors' code. From the
    second step on these entries and the task's head train; everything else stays to the bit. The
    head is all that lies outside the encoder. Weight decay leaves the entries alone, as the authors
    decay the increments, which are nearly zero; the head's weights, in the same group, go without.

    A family with one linear of query, key and value takes the three as one matrix. Saved are
    optimizer state and traffic between processes of what is frozen, and the weight gradients of
    linears that are not chosen; chosen linears take a dense gradient first. The first step costs
    a whole one.
    """

    name = "sift"
    summary = "the entries with the largest gradients of the first step train, and the head"
    learning_rate = 7e-5
    needs_whole_gradients = True

    share: float = option(0.008, "share of each chosen matrix that trains")
    roles: Sequence[str] = option(ROLES[:4], f"linears that train a share: {', '.join(ROLES)}")
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", "a share in (0, 1)", self.share)
        require(len(self.roles) > 0, "roles", "at least one", "none")
        for role in self.roles:
            require_one_of(role, "roles", ROLES)
        self.roles = tuple(dict.fromkeys(self.roles))

    def begin(self, run: Run) -> None:
        """Check that the model has the linears."""
        linears_of(run.model, self.roles)
        self._kept.clear()

    def begin_step(self, run: Run) -> None:
        """Swap the chosen linears once the entries are known."""
        if run.plan is None and self._kept:
            run.plan = run.world.agree(lambda: self._plan(run))
            self._apply(run, run.plan)
            kept = sum(mask.kept_entries for mask in run.plan.update_masks.values())
            matrices = len(run.plan.update_masks)
            run.events.append(f"step {run.step}: {kept} entries of {matrices} matrices train")
            self._kept.clear()

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Choose the entries by the first gradients, and drop these."""
        if run.plan is not None:
            return
        weights = self._weights(run)
        grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
        require(len(grads) == len(weights), "roles", "linears with a gradient", "one without")
        counts = [kept_count(grad.numel(), self.share) for grad in grads.values()]
        kept = select_elements(
            list(grads.values()), k=counts, score="abs_value", scope="per_tensor"
        )
        self._kept.update({name: kept.packed(i).clone() for i, name in enumerate(grads)})
        for parameter in run.model.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The bits of the entries, between the first step and the second."""
        return dict(self._kept)

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Swap the linears again, or know again what to swap."""
        self.begin(run)
        self._kept.update(tensors)
        if run.plan is not None:
            self._apply(run, run.plan)

    def needs_eager(self) -> str | None:
        """The first step alone reads gradients; it cannot be told apart in a captured one."""
        return "sift reads the gradients of the first step"

    def _plan(self, run: Run) -> Plan:
        weights, head = self._weights(run), head_of(run.model)
        masks = {
            name: Mask.elements(unpack_bits(self._kept[name], weight.numel()).view(weight.shape))
            for name, weight in weights.items()
        }
        return plan_of(
            run,
            self.name,
            Parts(whole=head, shares=dict.fromkeys(weights, 1.0)),  # single entries: all of it
            update_masks=masks,
            trainable=(*(f"{name}.weight" for name in weights), *head),
            shapes=structure_of(run.model).shapes(),
            origin={"share": self.share, "roles": list(self.roles), "step": run.step},
        )

    def _weights(self, run: Run) -> dict[str, Tensor]:
        linears = linears_of(run.model, self.roles)
        return {name: linear.weight for name, linear in linears.items()}

    def _apply(self, run: Run, plan: Plan) -> None:
        apply(run.model, plan, optimizer=run.optimizer)
        _stop_decay(run, plan)


def kept_count(entries: int, share: float) -> int:
    """Entries of a matrix that train: ``int(share·N) + 1``, all of them at most."""
    return min(int(share * entries) + 1, entries)


def _stop_decay(run: Run, plan: Plan) -> None:
    """Let no group that holds chosen entries decay."""
    modules = (run.model.get_submodule(name) for name in plan.update_masks)
    chosen = {id(m.values) for m in modules if isinstance(m, SelectiveLinear)}
    for group in run.inner_optimizer.param_groups:
        if any(id(parameter) in chosen for parameter in group["params"]):
            group["weight_decay"] = 0.0
