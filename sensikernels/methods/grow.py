"""Growth of the trained part: the most salient weights join while the run goes.

A relative of APT (Zhao et al. 2024, arXiv 2401.12200), not a copy: see ``Grow``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require, require_one_of
from sensikernels.hf import encoder_layers, is_norm
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.trained import (
    head_of,
    names_of,
    ranking_gradients,
    train_as_planned,
    train_only,
)

STARTS = ("biases", "head")


def encoder_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the linears of the encoder's layers, by parameter name."""
    found = {}
    for layer in encoder_layers(model):
        for role in layer.family.linears:
            if layer.has(role):
                name = f"{layer.name(role)}.weight"
                found[name] = model.get_parameter(name)
    return found


def moments(max_steps: int, stages: int) -> list[int]:
    """The steps before which weights join: they cut the run into ``stages`` + 1 equal parts."""
    return [stage * max_steps // (stages + 1) for stage in range(1, stages + 1)]


def joining(
    salience: Mapping[str, float], sizes: Mapping[str, int], trained: Sequence[str], room: float
) -> list[str]:
    """The names that join ``trained``: the most salient first, each that still fits ``room``.

    ``room``: entries that may train, those of ``trained`` included. Ties go to the lower layer.
    """
    left = room - sum(sizes[name] for name in trained if name in sizes)
    chosen = []
    for name in sorted((n for n in sizes if n not in trained), key=lambda n: -salience[n]):
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return chosen


@dataclass(kw_only=True, eq=False)
class Grow(Method):
    """Train biases, norms and head; in ``stages`` the most salient weight matrices join them.

    A matrix' salience is Σ|w·∂L/∂w| per entry, summed over the ranking batches. At each of
    ``stages`` moments, evenly spread over the run, the most salient that fit join, until ``share``
    of the encoder's weights trains after the last moment. What trains is never frozen again.

    APT prunes a model and meanwhile adds ranks to the adapters of its most salient layers. Here
    whole matrices join and nothing is pruned; what both do is to add tuned parameters where
    salience is highest. ``start`` ``head`` trains the head alone until the first moment.
    """

    name = "grow"
    summary = "biases, norms and head train; the most salient weights join them in stages"
    needs_whole_gradients = True

    start: str = option("biases", "what trains at first: biases (with norms and head) or head")
    stages: int = option(4, "how often weights join, evenly spread over the run")
    share: float = option(0.5, "share of the encoder's weights that trains in the end")

    def __post_init__(self) -> None:
        require_one_of(self.start, "start", STARTS)
        require(self.stages >= 1, "stages", "at least 1", self.stages)
        require(0 < self.share <= 1, "share", "a share in (0, 1]", self.share)

    def begin(self, run: Run) -> None:
        """Freeze all but what trains at first. Raises UsageError where no weight fits ``share``."""
        sizes = [weight.numel() for weight in encoder_weights(run.model).values()]
        least = min(sizes) / sum(sizes)
        fits = self.share >= least
        require(fits, "share", f"at least {least:.4g}, that of one weight", self.share)
        names = list(head_of(run.model))
        if self.start == "biases":
            names += [n for n in names_of(run.model) if n.endswith("bias") or is_norm(n)]
        train_only(run, names, method=self.name, step=0)
        run.events.append(f"step 0: {len(_trained(run))} parameters train, the rest is frozen")

    def begin_step(self, run: Run) -> None:
        """Let weights join at a moment."""
        due = moments(run.max_steps, self.stages)
        if run.step not in due:
            return
        # Of moments that fall together in a short run the last one counts.
        stage = max(i for i, moment in enumerate(due, 1) if moment == run.step)
        sizes = {name: w.numel() for name, w in encoder_weights(run.model).items()}
        total, trained = sum(sizes.values()), _trained(run)
        salience, room = self._salience(run), self.share * stage / self.stages * total
        new = run.world.agree(lambda: joining(salience, sizes, trained, room))
        if new:
            train_only(run, (*trained, *new), method=self.name, step=run.step)
        now = sum(sizes[name] for name in _trained(run) if name in sizes) / total
        run.events.append(
            f"step {run.step}: {len(new)} weights join, {now:.3f} of the encoder's train"
        )

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Train what had joined."""
        train_as_planned(run)

    def _salience(self, run: Run) -> dict[str, float]:
        """Σ|w·∂L/∂w| per entry of every encoder weight, over the batches of all processes."""
        weights = encoder_weights(run.model)
        sums = {name: torch.zeros((), dtype=torch.float64) for name in weights}
        with ranking_gradients(run, weights) as gradients:
            for batch in run.batches():
                for name, grad in gradients(batch).items():
                    product = weights[name].detach().float() * grad.float()
                    sums[name] += product.abs().sum(dtype=torch.float64).cpu()
        run.world.sum_(sums)
        found = any(float(value) > 0 for value in sums.values())
        require(found, "batches", "some that give the encoder's weights a gradient", "none")
        return {name: float(value) / weights[name].numel() for name, value in sums.items()}


def _trained(run: Run) -> tuple[str, ...]:
    assert run.plan is not None
    assert run.plan.trainable is not None
    return run.plan.trainable
