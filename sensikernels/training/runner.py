"""One model in training: its optimizer, method, schedule and random stream, a batch at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels._core.checks import require
from sensikernels._core.errors import SensiError
from sensikernels._core.timing import synchronize
from sensikernels.hf import is_norm, use_counter_dropout, use_packed
from sensikernels.masks import Budget, StepCosts
from sensikernels.methods import BASELINE, Method, Run
from sensikernels.optim import SubsetAdamW
from sensikernels.training.amp import Amp
from sensikernels.training.config import AUTOCAST, Settings
from sensikernels.training.data import Data
from sensikernels.training.distributed import alone, require_same, whole, wrap
from sensikernels.training.graph import GraphedStep
from sensikernels.training.predict import predict
from sensikernels.training.random import get_random, seeded, set_random
from sensikernels.training.schedule import Schedule
from sensikernels.training.stopping import Best
from sensikernels.world import ALONE, World


@dataclass(kw_only=True, eq=False)
class Runner:
    """Trains ``run.model``; ``losses`` and ``step_ms`` have one entry per step done.

    The random stream is its own, swapped in around each step, so what other models do between
    steps changes nothing. ``changed_at``: the step before which the method last swapped layers.
    ``evaluated_after``: seconds of steps and ranking before each evaluation.
    ``seconds``: ``rank`` (hooks before a step: sensitivity and trimming), ``evaluate``.
    """

    name: str
    run: Run
    method: Method
    learning_rate: float
    schedule: Schedule
    max_grad_norm: float | None
    seed: int
    world: World = ALONE
    accumulate: int = 1
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"rank": 0.0, "evaluate": 0.0})
    changed_at: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    evaluated_at: list[int] = field(default_factory=list)
    evaluated_after: list[float] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    autocast: torch.dtype | None = None
    logits: Tensor | None = None
    truth: Any = None

    def __post_init__(self) -> None:
        self.amp = Amp(self.device, self.autocast)
        self._random = seeded(self.seed, self.device, self.world.rank)
        self._together: nn.Module | None = None
        self._graphed: GraphedStep | None = None

    @property
    def model(self) -> nn.Module:
        """The model, with whatever layers the method has put into it."""
        return self.run.model

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return next(self.run.model.parameters()).device

    def begin(self) -> None:
        """Before the first step."""
        with self.own_random(), self._timed("rank"):
            self.method.begin(self.run)

    def step(self, *batches: Mapping[str, Tensor], weights: Sequence[float] = ()) -> float:
        """Forward, backward, update; returns the loss. Raises SensiError if it is not finite.

        Several ``batches`` accumulate their gradients. Each of several processes has its share of
        a batch, of this weight (``distributed.Share``; 1 if not given); gradients and the loss are
        those of all rows.
        """
        run = self.run
        with self.own_random():
            plan = run.plan
            with self._timed("rank"):
                self.method.begin_step(run)
            if run.plan is not plan:
                self.changed_at = run.step
                self._together = None
            if self._together is None:
                self._together = wrap(self.world, run, settled=self.settled)
                self._graphed = self._graphs()
            synchronize(self.device)
            start = time.perf_counter()
            self._together.train()
            self._set_rate()
            loss = self._graphed(*batches) if self._graphed else self._eager(batches, weights)
            value = self.world.mean(loss)
            synchronize(self.device)
            self.step_ms.append((time.perf_counter() - start) * 1e3)
        if run.plan is not plan:
            require_same(self.world, run.plan)
        run.step += 1
        if not math.isfinite(value):
            raise SensiError(f"{self.name}: loss is {value} at step {run.step}: training diverged")
        self.losses.append(value)
        return value

    def _set_rate(self) -> None:
        run = self.run
        rate = self.schedule.rate(self.learning_rate, run.step - self.amp.skipped, run.max_steps)
        factor = self.method.rate_factor(run)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * factor

    def _eager(self, batches: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensor:
        run = self.run
        losses = []
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            with nullcontext() if last else alone(self._together):
                losses.append(self._backward(batch, weights[place] if weights else 1.0))
        self.world.average_rows(run.model)
        if self.amp.unscale(run.optimizer):
            self.method.before_step(run)
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(run.model.parameters(), self.max_grad_norm)
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(self, batch: Mapping[str, Tensor], weight: float) -> Tensor:
        """Add the gradients of a batch; its weighted loss."""
        assert self._together is not None
        with self.amp.autocast():
            loss = self.method.loss(self.run, self._together, batch)
        loss = loss if weight == 1 else loss * weight
        self.amp.backward(loss)
        return loss.detach()

    def _graphs(self) -> GraphedStep | None:
        """Captured steps on a GPU; elsewhere, and for the reason the report then gives, none."""
        run = self.run
        if self.device.type != "cuda":
            return None
        graphed = GraphedStep(
            run.model, run.optimizer, lambda batch: self.method.loss(run, run.model, batch)
        )
        graphed.reason = self._needs_eager()
        said = graphed.explain()
        if not any(event.endswith(said) for event in run.events):
            run.events.append(f"step {run.step}: {said}")
        return graphed if graphed.reason is None else None

    def _needs_eager(self) -> str | None:
        """The reason why no graph can hold the step; None if one can."""
        if self.autocast is not None:
            return "fp16 leaves steps out by what it finds in the gradients"
        if self.accumulate > 1:
            return f"a step adds up the gradients of {self.accumulate} batches"
        if self.world.size > 1:
            return f"{self.world.size} processes reduce gradients"
        if not isinstance(self.run.optimizer, SubsetAdamW):
            return f"{type(self.run.optimizer).__name__} is torch's, clipped outside"
        return self.method.needs_eager()

    @torch.no_grad()
    def evaluate(self, data: Data) -> dict[str, float]:
        """The task's metrics on the development rows; keeps the logits and their truth."""
        from sensikernels.data import compute

        with self._timed("evaluate"):
            if isinstance(self.run.optimizer, SubsetAdamW):
                self.run.optimizer.flush()
            with self.amp.autocast():
                self.logits, self.truth = predict(self.model, data, self.world)
        metrics = compute(data.task, self.logits, self.truth)
        self.epochs.append(metrics)
        self.evaluated_at.append(self.run.step)
        self.evaluated_after.append(sum(self.step_ms) / 1e3 + self.seconds["rank"])
        return metrics

    @property
    def settled(self) -> bool:
        """True once the model is the one that the run will save."""
        return self.method.settled(self.run)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Draw from this runner's random stream inside the block."""
        outside = get_random(self.device)
        set_random(self._random, self.device)
        try:
            yield
        finally:
            self._random = get_random(self.device)
            set_random(outside, self.device)

    def state(self) -> dict[str, Any]:
        """All that a continuation needs, plan apart, as a tree of tensors and plain values.

        The same on every process; every process must ask for it.
        """
        return {
            "model": whole(self.world, self.model),
            "optimizer": self.run.optimizer.state_dict(),
            "method": self.method.state(),
            "random": self.world.gather(self._random),
            "step": self.run.step,
            "trimmed_at": self.run.trimmed_at,
            "events": list(self.run.events),
            "best": self.best.state(),
            "amp": self.amp.state(),
            **{name: getattr(self, name) for name in _KEPT},
        }

    def check_state(self, state: Mapping[str, Any], step: int) -> None:
        """Raise UsageError unless ``state`` can be one of this runner after ``step`` steps."""
        known = {"model", "optimizer", "method", "random", *_OF_RUN, "best", "amp", *_KEPT}
        require(state.keys() == known, "state", sorted(known), sorted(state))
        for name in ("losses", "step_ms"):
            values = state[name]
            ok = len(values) == step and all(type(value) is float for value in values)
            require(ok, name, f"{step} numbers", f"{len(values)} values")
        at = state["changed_at"]
        require(type(at) is int and 0 <= at <= step == state["step"], "changed_at", step, at)
        at = state["trimmed_at"]
        require(at is None or (type(at) is int and 0 <= at <= step), "trimmed_at", step, at)
        require(all(isinstance(e, str) for e in state["events"]), "events", "lines", "others")
        numbers = [state["seconds"], *state["epochs"], dict(enumerate(state["evaluated_after"]))]
        ok = all(type(v) is float for values in numbers for v in values.values())
        require(
            ok and state["seconds"].keys() == self.seconds.keys(), "seconds", "numbers", numbers
        )
        at = state["evaluated_at"]
        counts = {len(at), len(state["epochs"]), len(state["evaluated_after"])}
        ok = len(counts) == 1 and all(type(n) is int and 0 < n <= step for n in at)
        require(ok, "evaluated_at", "the step of each evaluation", at)
        for stream in state["random"]:
            for kind, now in self._random.items():
                same = kind not in stream or (
                    stream[kind].dtype == now.dtype and stream[kind].shape == now.shape
                )
                require(same, f"random {kind}", list(now.shape), "another generator's state")

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; ``run.plan`` is set already."""
        run = self.run
        run.step, run.trimmed_at = state["step"], state["trimmed_at"]
        self.method.resume(run, state["method"])
        for name, value in run.model.state_dict().items():
            got = state["model"][name].dtype
            require(got == value.dtype, f"model: {name}", value.dtype, got)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        # A process that was not there before starts a stream of its own.
        streams, rank = state["random"], self.world.rank
        fresh = rank >= len(streams)
        self._random = seeded(self.seed, self.device, rank, run.step) if fresh else streams[rank]
        run.events[:] = state["events"]
        self.best.load_state(state["best"], run.step)
        self.amp.load_state(state["amp"], run.step)
        for name in _KEPT:
            setattr(self, name, state[name])

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[what] += time.perf_counter() - start


_OF_RUN = ("step", "trimmed_at", "events")
_KEPT = (
    "losses",
    "step_ms",
    "seconds",
    "changed_at",
    "epochs",
    "evaluated_at",
    "evaluated_after",
)


def method_runner(settings: Settings, data: Data, model: nn.Module, max_steps: int) -> Runner:
    """The method on this package's step: packed tokens, counter dropout, row-sparse words."""
    method = settings.make_method()
    if settings.packed:
        use_packed(model)
    words = _word_embeddings(model)
    words.sparse = settings.embeddings == "sparse"
    words.weight.requires_grad_(settings.embeddings != "frozen")
    if settings.dropout == "counter":
        use_counter_dropout(model)
    rate = settings.learning_rate()

    def make_optimizer(trained: nn.Module) -> SubsetAdamW:
        clip = settings.max_grad_norm or None
        return SubsetAdamW(groups(trained, settings.weight_decay), lr=rate, max_grad_norm=clip)

    run = _run(settings, data, model, make_optimizer(model), max_steps, settings.budget)
    run.make_optimizer = make_optimizer
    run.costs = None if settings.costs is None else StepCosts.load(settings.costs)
    return Runner(
        name=method.name,
        run=run,
        method=method,
        learning_rate=rate,
        schedule=Schedule.of(settings, method.schedule),
        max_grad_norm=None,
        seed=settings.seed,
        world=data.world,
        accumulate=settings.gradient_accumulation_steps,
        autocast=AUTOCAST.get(settings.dtype),
        best=Best(
            patience=settings.early_stopping_patience, threshold=settings.early_stopping_threshold
        ),
    )


def dense_runner(settings: Settings, data: Data, model: nn.Module, max_steps: int) -> Runner:
    """The baseline: HuggingFace's model as it is, dense embeddings, torch's fused AdamW."""
    rate = settings.dense_learning_rate()
    optimizer = torch.optim.AdamW(groups(model, settings.weight_decay), lr=rate, fused=True)
    return Runner(
        name="dense baseline",
        run=_run(settings, data, model, optimizer, max_steps, None),
        method=BASELINE(),
        learning_rate=rate,
        schedule=Schedule.of(settings, BASELINE.schedule),
        max_grad_norm=settings.max_grad_norm or None,
        seed=settings.seed,
        world=replace(data.world, parallel="ddp"),
        accumulate=settings.gradient_accumulation_steps,
        autocast=AUTOCAST.get(settings.dtype),
    )


def _run(
    settings: Settings,
    data: Data,
    model: nn.Module,
    optimizer: Optimizer,
    max_steps: int,
    budget: Budget | None,
) -> Run:
    return Run(
        model=model,
        optimizer=optimizer,
        max_steps=max_steps,
        batches=data.ranked,
        geometry=data.geometry,
        world=data.world,
        budget=budget,
        seed=settings.seed,
    )


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters in two groups: weights decay, biases and norms do not."""
    named = list(model.named_parameters())
    plain = [p for n, p in named if n.endswith("bias") or is_norm(n)]
    bare = {id(p) for p in plain}
    return [
        {"params": [p for _, p in named if id(p) not in bare], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _word_embeddings(model: nn.Module) -> nn.Embedding:
    table = model.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(table, nn.Embedding)
    return table
