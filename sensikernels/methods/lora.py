"""LoRA through PEFT, the baseline of small updates (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.hf import apply, restore
from sensikernels.hf.adapters import inject_lora, merge_lora
from sensikernels.masks import Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, head_and_pooler, linears_of, plan_of


@dataclass(kw_only=True, eq=False)
class LoRA(Method):
    """Train ``W + (alpha/rank) · B A`` with W frozen, on the linears of ``roles``.

    The head trains too, all else is frozen. Layers are PEFT's, run inside the packed step; what is
    saved has them merged. No gradient of W is computed; forward and input gradients cost what they
    did, and the adapters' own products come on top. The learning rate is ours.
    """

    name = "lora"
    summary = "adapters of low rank train beside frozen weights (PEFT)"
    learning_rate = 3e-4

    rank: int = option(8, "rank of every adapter")
    alpha: float = option(16.0, "adapters are scaled by alpha / rank")
    dropout: float = option(0.1, "dropout of what adapters read")
    roles: Sequence[str] = option(("query", "value"), "linears that get an adapter")

    def __post_init__(self) -> None:
        check_adapters(self.rank, self.alpha, self.dropout)
        self.roles = tuple(self.roles)

    def begin(self, run: Run) -> None:
        """Put the adapters in and freeze the rest before the first step."""
        self._prepare(run)
        count = len(linears_of(run.model, tuple(self.roles)))
        run.events.append(f"step 0: {count} adapters of rank {self.rank} train")

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Weights of adapters come with the model's; their places follow from the options."""
        self._prepare(run)

    def shape(self, model: nn.Module, plan: Plan) -> None:
        """Adapters first: the plan names them."""
        adapt(self, model, seed=0)
        super().shape(model, plan)

    def end(self, run: Run) -> None:
        """Merge the adapters, so that the model is a plain one."""
        restore(run.model, optimizer=run.optimizer)
        merge_lora(run.model)

    def _prepare(self, run: Run) -> None:
        head, names = head_and_pooler(run.model), linears_of(run.model, tuple(self.roles))
        parts = Parts(whole=head, ranks=dict.fromkeys(names, self.rank))
        plan = plan_of(run, self.name, parts, origin=self.options() | {"roles": [*self.roles]})
        run.plan = replace(plan, trainable=(*adapt(self, run.model, seed=run.seed), *head))
        apply(run.model, run.plan, optimizer=run.optimizer)


class Adapters(Protocol):
    """A method's options for its adapters."""

    rank: int
    alpha: float
    dropout: float
    roles: Sequence[str]


def adapt(asked: Adapters, model: nn.Module, *, seed: int) -> tuple[str, ...]:
    """Put a method's adapters into ``model``; the names of their parameters."""
    return inject_lora(
        model,
        linears_of(model, tuple(asked.roles)),
        rank=asked.rank,
        alpha=asked.alpha,
        dropout=asked.dropout,
        seed=seed,
    )


def check_adapters(rank: int, alpha: float, dropout: float) -> None:
    """Raise UsageError unless adapters can have these settings."""
    require(type(rank) is int and rank >= 1, "rank", "a whole number of at least 1", rank)
    require(alpha > 0, "alpha", "a number above 0", alpha)
    require(0 <= dropout < 1, "dropout", "a share in [0, 1)", dropout)
