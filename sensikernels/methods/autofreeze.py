"""AutoFreeze: layers whose gradients have settled are frozen, from the lowest on (2102.01386)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.hf import cache_frozen_prefix, encoder_layers, packing_of
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.freeze import below, drop_nothing_below
from sensikernels.methods.trained import names_of, train_as_planned, train_only


def interval_length(max_steps: int, intervals: int) -> int:
    """Steps of an interval: the run has at most ``intervals`` of them."""
    return max(math.ceil(max_steps / intervals), 1)


def new_start(before: Tensor, now: Tensor, start: int, percentile: float) -> int:
    """The lowest layer that goes on training: the first at ``start`` or above that has not settled.

    ``before`` and ``now``: float64 ``[layers]``, norms of the gradients of two intervals. A layer
    has settled where they differ by less, relatively, than ``percentile`` of 100 of the layers that
    train do; percentiles lie linearly between two of them.
    """
    tiny = torch.finfo(before.dtype).tiny
    change = ((before - now).abs() / before.clamp_min(tiny))[start:]
    threshold = torch.quantile(change, percentile / 100).clamp_max(change.max())
    return start + int((change >= threshold).nonzero()[0])


@dataclass(kw_only=True, eq=False)
class AutoFreeze(Method):
    """Freeze the lowest layers, with the embeddings, as soon as their gradients have settled.

    Liu et al. 2021, arXiv 2102.01386. Within an interval gradients are added up tensor by tensor;
    Δ of a layer is Σ‖ΣG‖₁ over its tensors, its change |Δ_before − Δ_now| / Δ_before. Everything
    under the first layer whose change reaches the ``percentile`` is frozen for the rest of the run;
    nothing is while that is layer 0. The sums take a float32 copy of what trains in the layers.
    ``cache`` keeps what the frozen part makes of every sentence: dropout is off there, and each
    time more is frozen sentences are computed once again. It needs packed tokens and one process.
    """

    name = "autofreeze"
    summary = "layers are frozen from the lowest on, as soon as their gradients have settled"
    needs_whole_gradients = True

    intervals: int = option(10, "parts of the run, at whose ends layers may be frozen")
    percentile: float = option(50.0, "of the layers' changes: below it a layer has settled")
    cache: bool = option(False, "keep the output of the frozen layers for every sentence")
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _before: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.intervals >= 1, "intervals", "at least 1", self.intervals)
        share = 0 <= self.percentile <= 100
        require(share, "percentile", "a number from 0 to 100", self.percentile)

    def begin(self, run: Run) -> None:
        """Train everything at first."""
        self._check(run)
        self._train_from(run, 0)

    def begin_step(self, run: Run) -> None:
        """Compare and freeze at the end of an interval."""
        if run.step == 0 or run.step % interval_length(run.max_steps, self.intervals):
            return
        before, now, start = self._before, self._norms(run), self._start(run)
        self._sums.clear()
        self._before = now
        if before is None:
            return
        held = before
        lowest = run.world.agree(lambda: new_start(held, now, start, self.percentile))
        if lowest > start:
            self._train_from(run, lowest)
            run.events.append(f"step {run.step}: embeddings and {lowest} layers frozen")

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Add up the gradients of the layers that train."""
        for layer in encoder_layers(run.model)[self._start(run) :]:
            for name, parameter in layer.module.named_parameters(prefix=layer.prefix):
                if parameter.grad is None:
                    continue
                if name in self._sums:
                    self._sums[name] += parameter.grad
                else:
                    self._sums[name] = parameter.grad.float().clone()

    def state(self) -> dict[str, Tensor]:
        """The sums of the interval under way, and the norms of the one before."""
        sums = {f"sum.{name}": value for name, value in self._sums.items()}
        return sums if self._before is None else {**sums, "before": self._before}

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Freeze what was frozen, and take the sums back."""
        self._check(run)
        train_as_planned(run)
        self._keep_prefix(run)
        params = dict(run.model.named_parameters())
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "before":
                self._before = value.cpu()
            else:
                self._sums[name] = value.to(params[name].device)

    def _check(self, run: Run) -> None:
        if self.cache:
            require(run.world.size == 1, "cache", "one process", run.world.size)
            require(packing_of(run.model) is not None, "cache", "packed tokens", "padded ones")

    def _norms(self, run: Run) -> Tensor:
        """Δ of every layer, float64 ``[layers]`` on the CPU; 0 where nothing trained."""
        layers = encoder_layers(run.model)
        norms = torch.zeros(len(layers), dtype=torch.float64)
        for i, layer in enumerate(layers):
            mine = (v for n, v in self._sums.items() if n.startswith(f"{layer.prefix}."))
            norms[i] = sum(float(value.abs().sum(dtype=torch.float64)) for value in mine)
        return norms

    def _start(self, run: Run) -> int:
        """The lowest layer that trains."""
        assert run.plan is not None
        return int(run.plan.origin["start"])

    def _train_from(self, run: Run, start: int) -> None:
        frozen = _under(run.model, start)
        names = (name for name in names_of(run.model) if not name.startswith(frozen))
        train_only(run, names, method=self.name, start=start, step=run.step)
        self._keep_prefix(run)

    def _keep_prefix(self, run: Run) -> None:
        start = self._start(run)
        if self.cache and start > 0:
            drop_nothing_below(run.model, start / len(encoder_layers(run.model)))
            cache_frozen_prefix(run.model)


def _under(model: nn.Module, start: int) -> tuple[str, ...]:
    """Prefixes of the names of all that lies under layer ``start``; none under the lowest."""
    return below(model, start / len(encoder_layers(model))) if start else ()
