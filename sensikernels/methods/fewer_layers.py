"""A smaller dense model: the lowest layers of the encoder, trained from the first step on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.hf import encoder_layers, structure_of
from sensikernels.hf.depth import keep_lowest
from sensikernels.masks import Budget, Plan, Structure
from sensikernels.methods.base import Method, Run, option


@dataclass(kw_only=True, eq=False)
class FewerLayers(Method):
    """Drop upper layers before the first step, down to the budget, and train what is left.

    Sajjad et al. 2020 (arXiv 2004.03844) find that of all ways to drop layers the upper ones cost
    least. Here it is the baseline that a trimmed model must beat. ``layers``: how many stay, by
    default the number whose FLOPs or parameters are nearest to the budget, above it or below.
    """

    name = "fewer-layers"
    summary = "the lowest layers alone, a smaller dense model to compare with"
    needs_budget = True

    layers: str = option("nearest", "layers that stay: a number, or nearest to the budget")

    def __post_init__(self) -> None:
        known = self.layers == "nearest" or (self.layers.isdecimal() and int(self.layers) > 0)
        require(known, "layers", "a number above 0, or nearest", self.layers)

    def begin(self, run: Run) -> None:
        """Drop the layers."""
        budget = self.budget_of(run)
        whole = structure_of(run.model).at(run.geometry)
        depth = self._depth(run.model, whole, budget, run.geometry.mean_length)
        keep_lowest(run.model, depth, optimizer=run.optimizer)
        length = run.geometry.mean_length
        left = structure_of(run.model).at(run.geometry)
        run.plan = Plan(
            method=self.name,
            budget=budget,
            sequence_length=length,
            flops_dense=whole.flops(length),
            flops_planned=left.flops(length),
            params_dense=whole.params(),
            params_planned=left.params(),
            origin={"layers": depth},
        )
        run.events.append(f"step {run.step}: {depth} layers kept")

    def shape(self, model: nn.Module, plan: Plan) -> None:
        """As many layers as were kept."""
        keep_lowest(model, int(plan.origin["layers"]))

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Dropping needs nothing but the budget."""
        self.begin(run)

    def _depth(self, model: nn.Module, whole: Structure, budget: Budget, length: float) -> int:
        every = len(encoder_layers(model))
        if self.layers != "nearest":
            require(int(self.layers) <= every, "layers", f"at most {every}", self.layers)
            return int(self.layers)
        shares = ("flops", "params")
        require(budget.measure in shares, "budget", "one of FLOPs or parameters", budget.measure)
        asked = budget.flops if budget.params is None else budget.params
        assert asked is not None
        found = {
            depth: _share(whole, depth, every, budget, length) for depth in range(1, every + 1)
        }
        return min(found, key=lambda depth: abs(found[depth] - asked))


def _share(whole: Structure, depth: int, every: int, budget: Budget, length: float) -> float:
    """The share of the ``depth`` lowest layers, the last of which costs what a last one costs."""
    stays = [c for c in whole.couplings if c.layer < depth - 1 or c.layer == every - 1]
    left = replace(whole, couplings=tuple(stays))
    if budget.params is not None:
        return left.params() / whole.params()
    return left.flops(length) / whole.flops(length)
