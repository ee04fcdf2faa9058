"""Sensi-BERT: rank every tensor, trim it during fine-tuning to a budget.

Kundu et al. 2023, arXiv 2307.11764. The paper's text gives the idea and no code: warm-up,
criterion, allocation and the moment of trimming are a reconstruction, each a field here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import CRITERIA, apply, sensitivity
from sensikernels.hf.criteria import STATISTICS
from sensikernels.hf.targets import GRANULARITIES
from sensikernels.masks import Budget, Plan, Scores, plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.step_time import by_the_clock

RANKINGS = ("ranked", "uniform", "random", "reversed")


@dataclass(kw_only=True, eq=False)
class SensiBert(Method):
    """Train ``warmup`` of the steps dense, rank once, trim, go on.

    ``ranking`` other than ``ranked`` is a control at the same budget: ``uniform`` keeps the same
    share in every layer (by magnitude), ``random`` and ``reversed`` permute the scores.
    """

    name = "sensi-bert"
    summary = "rank heads and neurons once, trim them, train what is left"
    needs_budget = True

    warmup: float = option(0.1, "share of the steps that train dense before the trim")
    criterion: str = option("mask-gradient", f"how units are ranked: {', '.join(CRITERIA)}")
    statistic: str = option("sum_batch_grad_squared", f"of mask gradients: {', '.join(STATISTICS)}")
    granularity: str = option("heads", f"units of attention: {', '.join(GRANULARITIES)}")
    ranking: str = option("ranked", f"the scores, or a control: {', '.join(RANKINGS[1:])}")
    multiples: Mapping[str, int] | None = option(
        None, "kept counts are multiples of these: heads:1,neurons:16"
    )
    _given: Plan | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, "warmup", "a share of the steps in [0, 1)", self.warmup)
        require_one_of(self.ranking, "ranking", RANKINGS)
        require_one_of(self.criterion, "criterion", CRITERIA)
        require_one_of(self.statistic, "statistic", STATISTICS)
        require_one_of(self.granularity, "granularity", GRANULARITIES)

    @classmethod
    def planned(cls, plan: Plan, **options: Any) -> SensiBert:
        """Trim to ``plan`` after the warm-up, and rank nothing."""
        made = cls(**options)
        made._given = plan
        return made

    def begin(self, run: Run) -> None:
        """Check what ranking needs, and say where it would come before any training."""
        if self._given is not None:
            return
        alone = self.criterion != "learned" or run.world.size == 1
        require(alone, "criterion", "not learned in several processes", self.criterion)
        if 0 < self.warmup and self.warmup_steps(run) == 0 < run.max_steps:
            enough = math.ceil(1000 / run.max_steps) / 1000
            remedy = f" (warmup={enough:g} trains it for a step)" if enough < 1 else ""
            run.events.append(
                f"step 0: warmup {self.warmup:g} of {run.max_steps} steps is none: the new head is "
                f"ranked untrained{remedy}"
            )

    def warmup_steps(self, run: Run) -> int:
        """Steps before the trim."""
        return int(self.warmup * run.max_steps)

    def begin_step(self, run: Run) -> None:
        """Rank and trim once the warm-up is over."""
        if run.plan is not None or run.step < self.warmup_steps(run):
            return
        if self._given is not None:
            self._trim(run, self._given)
            return
        run.scores = scores = self._scores(run)
        self._trim(run, self._plan(run, scores))

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Trim at once where the run had trimmed already."""
        if run.plan is not None:
            self._trim(run, run.plan)

    def _scores(self, run: Run) -> Scores:
        criterion = "magnitude" if self.ranking == "uniform" else self.criterion
        scores = sensitivity(
            run.model,
            run.batches(),
            criterion,
            granularity=self.granularity,
            statistic=self.statistic,
            compute_loss=run.compute_loss,
        )
        if self.ranking == "random":
            return scores.random(run.seed)
        return scores.reversed() if self.ranking == "reversed" else scores

    def _plan(self, run: Run, scores: Scores) -> Plan:
        budget = self.budget_of(run)
        if self.ranking == "uniform":
            budget = replace(budget, scope="per_layer")

        def allocate(asked: Budget) -> Plan:
            return plan(
                scores,
                asked,
                method=self.name,
                geometry=run.geometry,
                multiples=self.multiples,
                costs=run.costs,
            )

        if budget.step_time is not None:
            return by_the_clock(run, allocate, budget)
        made: Plan = run.world.agree(lambda: allocate(budget))
        return made

    def _trim(self, run: Run, chosen: Plan) -> None:
        apply(run.model, chosen, optimizer=run.optimizer)
        run.plan = chosen
        met = chosen.origin.get("step_time")
        timed = "" if met is None else f", step time x{met['met']:.3f}"
        run.events.append(f"step {run.step}: trimmed to FLOPs x{chosen.flops_ratio:.4f}{timed}")
