"""A run under way: its runners, its place among the batches, its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensikernels._core.checks import require
from sensikernels.hf import load_model, structure_of
from sensikernels.masks import Plan, Scores, Structure
from sensikernels.training import checkpoint
from sensikernels.training.config import DTYPES, Settings
from sensikernels.training.data import Data, model_path
from sensikernels.training.distributed import Share, load_whole, shards, whole
from sensikernels.training.predict import predict
from sensikernels.training.ready import check_labels
from sensikernels.training.runner import Runner, method_runner
from sensikernels.training.trackers import Log


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The news that a watcher gets after each step."""

    step: int
    max_steps: int
    loss: float
    step_ms: Mapping[str, float]
    events: tuple[str, ...]


Watcher = Callable[[Progress], None]


@dataclass(kw_only=True, eq=False)
class Session:
    """A run under way: one or two runners that see the same batches.

    ``structure``: of the untrimmed model on the run's batches; ``dense_flops``: its measured
    training FLOPs per token. ``start``: the clock when the process began with the run.
    """

    settings: Settings
    data: Data
    runner: Runner
    dense: Runner | None
    max_steps: int
    dense_flops: float
    structure: Structure
    start: float = field(default_factory=time.perf_counter)
    epoch: int = 0
    batch: int = 0
    stopped_at: int | None = None
    log: Log = lambda values, step: None  # noqa: E731
    tokens: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"setup": 0.0, "wall": 0.0})

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The method's runner, then the baseline if there is one."""
        return (self.runner,) if self.dense is None else (self.runner, self.dense)

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.runner.run.step

    def train(self, watch: Watcher | None = None) -> None:
        """Every remaining epoch, with checkpoints on the way and one of the trained model."""
        self._evaluate_if_due()  # a kill may have come between checkpoint and evaluation
        for epoch in range(self.epoch, math.ceil(self.settings.epochs)):
            if self.done:
                break
            left = self.max_steps - self.step  # the last epoch may be a part of one
            for parts in islice(self.data.steps(epoch, self.batch), left):
                plan = self.runner.run.plan
                self._step(parts)
                self._log_step(plan)
                if watch is not None:
                    watch(self._progress())
                if self._checkpoint_is_due(plan):
                    self.save()
                self._evaluate_if_due()
                if self.stopped_at is not None:
                    break
            else:
                self.epoch, self.batch = epoch + 1, 0
        self._take_best()

    def _step(self, parts: Sequence[Share]) -> None:
        # Whoever is second finds a warmer cache: take turns.
        order = self.runners if self.step % 2 == 0 else self.runners[::-1]
        self.tokens.append(sum(part.tokens for part in parts))
        weights = [part.weight for part in parts]
        for runner in order:
            batches = (part.batch for part in parts)
            padded = map(self.data.padded, batches) if runner is self.dense else batches
            runner.step(*padded, weights=weights)
        self.batch += 1

    def _log_step(self, before: Plan | None) -> None:
        plan = self.runner.run.plan
        values: dict[str, float] = {}
        for runner in self.runners:
            kind = "train" if runner is self.runner else "dense_train"
            values |= {
                f"{kind}/loss": runner.losses[-1],
                f"{kind}/learning_rate": float(runner.run.optimizer.param_groups[0]["lr"]),
                f"{kind}/step_ms": runner.step_ms[-1],
                f"{kind}/tokens_per_s": self.tokens[-1] / runner.step_ms[-1] * 1e3,
            }
        if plan is not None and plan is not before:
            values["plan/flops_ratio"] = plan.flops_ratio
            values["plan/params_ratio"] = plan.params_ratio
        self.log(values, self.step)

    def _evaluate_if_due(self) -> None:
        """Evaluate at an epoch's end, every ``eval_steps`` and at the end; once at a step."""
        every, step = self.settings.eval_steps, self.step
        at_end = self.batch == self.data.steps_per_epoch or step == self.max_steps
        due = at_end or (every > 0 and step % every == 0)
        if not due or step == 0 or step in self.runner.evaluated_at[-1:]:
            return
        for runner in self.runners:
            metrics = runner.evaluate(self.data)
            kind = "eval" if runner is self.runner else "dense_eval"
            self.log({f"{kind}/{name}": v for name, v in metrics.items()}, step)
            value = metrics[self.data.task.main_metric]
            better = runner.settled and runner.best.take(step, value)
            if better and runner is self.runner and self.settings.keep_best:
                weights = whole(self.data.world, runner.model)
                runner.best.weights = {n: v.detach().cpu().clone() for n, v in weights.items()}
        if self.runner.best.exhausted and step < self.max_steps:
            self.stopped_at = step
            self.runner.run.events.append(f"step {step}: stopped early")
            self.save()

    def _take_best(self) -> None:
        """Put the best evaluation's weights into the method's model; its logits are there then."""
        runner, best = self.runner, self.runner.best
        other = self.settings.keep_best and best.step != self.step
        if other:
            load_whole(self.data.world, runner.model, best.weights or {})
            runner.run.events.append(f"step {self.step}: the model of step {best.step} is kept")
        if other or runner.logits is None:
            with runner.amp.autocast():
                runner.logits, runner.truth = predict(runner.model, self.data, self.data.world)

    @property
    def done(self) -> bool:
        """True after the last step, which may be one of early stopping."""
        return self.step == self.max_steps or self.stopped_at is not None

    def _checkpoint_is_due(self, before: Plan | None) -> bool:
        """At the trim and after the last step whatever was asked, so that none is done twice."""
        every, now = self.settings.checkpoint_every, self.runner.run.plan
        trimmed = now is not before and now is not None and bool(now.weight_masks)
        return trimmed or self.step == self.max_steps or (every > 0 and self.step % every == 0)

    def _progress(self) -> Progress:
        return Progress(
            step=self.step,
            max_steps=self.max_steps,
            loss=self.runner.losses[-1],
            step_ms={r.name: r.step_ms[-1] for r in self.runners},
            events=tuple(self.runner.run.events),
        )

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        scores = self.runner.run.scores
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "stopped_at": self.stopped_at,
            "tokens": self.tokens,
            "seconds": {**self.seconds, "wall": self.wall()},
            "runners": [runner.state() for runner in self.runners],
            "scores": None if scores is None else _scores_state(scores),
        }
        write = partial(
            checkpoint.save,
            self.settings.output,
            self.step,
            state,
            settings=_identity(self.settings, self.data),
            plan=self.runner.run.plan,
        )
        self.data.world.agree(write)

    def wall(self) -> float:
        """Seconds of this process and of those whose work it goes on with."""
        return self.seconds["wall"] + time.perf_counter() - self.start

    def unshard(self) -> None:
        """Put a sharded model together on the first process, as a checkpoint would bring it."""
        old = self.runner
        if not shards(self.data.world, old.model):
            return
        state = old.state()
        if self.data.world.first:
            model = fresh_model(self.settings, self.data)
            new = method_runner(self.settings, self.data, model, self.max_steps)
            for name in ("plan", "scores", "costs"):
                setattr(new.run, name, getattr(old.run, name))
            new.load_state(state)
            new.logits, new.truth = old.logits, old.truth
            self.runner = new

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError where it is not one of this run."""
        identity = _identity(self.settings, self.data)
        state, saved_plan = checkpoint.load(folder, settings=identity)
        structure = structure_of(self.runner.model, self.runner.method.granularity)
        with checkpoint.matching(folder):
            self._check_place(folder, state)
            if state["scores"] is not None:
                self.runner.run.scores = Scores(structure=structure, **state["scores"])
            self.runner.run.plan = saved_plan
            for runner, own in zip(self.runners, state["runners"], strict=True):
                runner.load_state(own)
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.tokens, self.seconds = state["tokens"], state["seconds"]
            self.stopped_at = state["stopped_at"]
        self.runner.run.events.append(f"step {self.step}: resumed")

    def _check_place(self, folder: Path, state: Any) -> None:
        """All parts of the state are of one step of this run, that of the folder's name."""
        step = int(folder.name.removeprefix("step-"))
        epoch, batch = state["epoch"], state["batch"]
        per_epoch = self.data.steps_per_epoch
        place = type(epoch) is type(batch) is int and 0 <= batch <= per_epoch
        at = epoch * per_epoch + batch if place and 0 <= epoch <= self.settings.epochs else None
        require(at == step <= self.max_steps, "step", step, at)
        require(state["stopped_at"] in (None, step), "stopped_at", step, state["stopped_at"])
        require(len(state["tokens"]) == step, "tokens", step, len(state["tokens"]))
        require(
            all(type(n) is int and n > 0 for n in state["tokens"]), "tokens", "counts", "others"
        )
        seconds = state["seconds"]
        ok = seconds.keys() == self.seconds.keys() and all(v >= 0 for v in seconds.values())
        require(ok, "seconds", [*self.seconds], seconds)
        for runner, own in zip(self.runners, state["runners"], strict=True):
            runner.check_state(own, step)


def fresh_model(settings: Settings, data: Data) -> nn.Module:
    """The pre-trained model with a new head for the task, the same at every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        model: Any = load_model(
            model_path(settings.model),
            labels=data.task.num_labels,
            dtype=DTYPES[settings.dtype],
            head=data.task.kind,
            problem=data.task.problem,
        )
    check_labels(settings, model, data)
    names = dict(enumerate(data.task.label_names))
    if names:
        model.config.id2label = names
        model.config.label2id = {name: index for index, name in names.items()}
    trained: nn.Module = model.to(data.device)
    return trained


def _identity(settings: Settings, data: Data) -> dict[str, Any]:
    return settings.identity() | {"data": data.fingerprint()}


def _scores_state(scores: Scores) -> dict[str, Any]:
    return {name: value for name, value in vars(scores).items() if name != "structure"}
