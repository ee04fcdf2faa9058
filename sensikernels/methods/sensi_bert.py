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
from sensikernels.hf import CRITERIA, apply, sensitivity, structure_of
from sensikernels.hf.criteria import STATISTICS, StepScores
from sensikernels.hf.criteria.steps import STATISTIC
from sensikernels.hf.targets import GRANULARITIES
from sensikernels.masks import Budget, Plan, Scores, plan
from sensikernels.masks.planning import ALLOCATIONS
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.step_time import by_the_clock

RANKINGS = ("ranked", "uniform", "random", "reversed")
RANKED_ON = ("rows", "steps")


@dataclass(kw_only=True, eq=False)
class SensiBert(Method):
    """Train ``warmup`` of the steps dense, rank once, trim, go on.

    ``ranked_on`` ``rows`` takes the mask gradients of the ranking rows once the warm-up is over,
    without dropout; ``steps`` adds up those of the warm-up's own steps, which costs no pass and
    ranks worse where few steps have to do for a small budget. Ranked on rows whatever is asked:
    other criteria and statistics, a run without a warm-up or whose warm-up gave no finite gradient,
    and a model with frozen weights among those to trim.

    After the trim the learning rate rises again over ``rewarm`` of the steps, as the moments and
    the loss are no longer those of the whole model.

    ``ranking`` other than ``ranked`` is a control at the same budget: ``uniform`` keeps the same
    share in every layer (by magnitude), ``random`` and ``reversed`` permute the scores.
    """

    name = "sensi-bert"
    summary = "rank heads and neurons once, trim them, train what is left"
    needs_budget = True
    learning_rate = 1e-4

    warmup: float = option(0.1, "share of the steps that train dense before the trim")
    rewarm: float = option(0.05, "share of the steps in which the rate rises again after the trim")
    criterion: str = option("mask-gradient", f"how units are ranked: {', '.join(CRITERIA)}")
    statistic: str = option("sum_batch_grad_squared", f"of mask gradients: {', '.join(STATISTICS)}")
    ranked_on: str = option("rows", "mask gradients of ranking rows, or of the warm-up's steps")
    granularity: str = option("heads", f"units of attention: {', '.join(GRANULARITIES)}")
    allocation: str = option(
        "units", "what competes: units, or tensors, each of which keeps a share by its own score"
    )
    ranking: str = option("ranked", f"the scores, or a control: {', '.join(RANKINGS[1:])}")
    multiples: Mapping[str, int] | None = option(
        None, "kept counts are multiples of these: heads:1,neurons:16"
    )
    _given: Plan | None = field(default=None, init=False, repr=False)
    _seen: StepScores | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, "warmup", "a share of the steps in [0, 1)", self.warmup)
        require(0 <= self.rewarm <= 1, "rewarm", "a share of the steps in [0, 1]", self.rewarm)
        require_one_of(self.ranking, "ranking", RANKINGS)
        require_one_of(self.ranked_on, "ranked_on", RANKED_ON)
        require_one_of(self.criterion, "criterion", CRITERIA)
        require_one_of(self.statistic, "statistic", STATISTICS)
        require_one_of(self.granularity, "granularity", GRANULARITIES)
        require_one_of(self.allocation, "allocation", ALLOCATIONS)

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
        measure = self.budget_of(run).measure
        shares = self.allocation == "units" or measure in ("flops", "params")
        require(shares, "allocation", f"units for a budget of {measure}", self.allocation)
        alone = self.criterion != "learned" or run.world.size == 1
        require(alone, "criterion", "not learned in several processes", self.criterion)
        if 0 < self.warmup and self.warmup_steps(run) == 0 < run.max_steps:
            enough = math.ceil(1000 / run.max_steps) / 1000
            remedy = f" (warmup={enough:g} trains it for a step)" if enough < 1 else ""
            run.events.append(
                f"step 0: warmup {self.warmup:g} of {run.max_steps} steps is none: the new head is "
                f"ranked untrained{remedy}"
            )
        self._seen = self._step_scores(run)

    def warmup_steps(self, run: Run) -> int:
        """Steps before the trim."""
        return int(self.warmup * run.max_steps)

    def rate_factor(self, run: Run) -> float:
        """Rises to 1 over the steps that follow the trim."""
        if run.trimmed_at is None:
            return 1.0
        done = run.step - run.trimmed_at + 1
        return min(1.0, done / max(1.0, self.rewarm * run.max_steps))

    def begin_step(self, run: Run) -> None:
        """Rank and trim once the warm-up is over."""
        if run.plan is not None or run.step < self.warmup_steps(run):
            return
        if self._given is not None:
            self._trim(run, self._given)
            return
        run.scores = scores = self._scores(run)
        self._seen = None
        self._trim(run, self._plan(run, scores))

    def before_step(self, run: Run) -> None:
        """Add the step's mask gradients up while the model is whole."""
        if self._seen is not None:
            self._seen.add()

    def needs_eager(self) -> str | None:
        """Only steps that rank units look at the gradients."""
        return "units are ranked by the warm-up's gradients" if self._seen is not None else None

    def state(self) -> dict[str, Tensor]:
        """What the warm-up's steps have added up."""
        return {} if self._seen is None else self._seen.state()

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Trim at once where the run had trimmed already; else go on with the ranking."""
        if run.plan is not None:
            apply(run.model, run.plan, optimizer=run.optimizer)
        else:
            self._seen = self._step_scores(run)
            if self._seen is not None:
                self._seen.load(tensors)

    def _step_scores(self, run: Run) -> StepScores | None:
        """Where the warm-up's own steps rank the units, their scores; else None."""
        by_mask = (self.criterion, self.statistic) == ("mask-gradient", STATISTIC)
        ranks = self._given is None and self.ranking != "uniform" and by_mask
        if not (ranks and self.ranked_on == "steps" and self.warmup_steps(run) > 0):
            return None
        made = StepScores(run.model, structure_of(run.model, self.granularity))
        return made if made.complete else None

    def _scores(self, run: Run) -> Scores:
        if self._seen is not None and self._seen.steps > 0:
            return self._controlled(run, self._seen.scores(run.geometry.mean_length))
        criterion = "magnitude" if self.ranking == "uniform" else self.criterion
        scores = sensitivity(
            run.model,
            run.batches(),
            criterion,
            granularity=self.granularity,
            statistic=self.statistic,
            compute_loss=run.compute_loss,
        )
        return self._controlled(run, scores)

    def _controlled(self, run: Run, scores: Scores) -> Scores:
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
                allocation=self.allocation,
                costs=run.costs,
            )

        if budget.step_time is not None:
            return by_the_clock(run, allocate, budget)
        made: Plan = run.world.agree(lambda: allocate(budget))
        return made

    def _trim(self, run: Run, chosen: Plan) -> None:
        apply(run.model, chosen, optimizer=run.optimizer)
        run.plan, run.trimmed_at = chosen, run.step
        met = chosen.origin.get("step_time")
        timed = "" if met is None else f", step time x{met['met']:.3f}"
        run.events.append(f"step {run.step}: trimmed to FLOPs x{chosen.flops_ratio:.4f}{timed}")
