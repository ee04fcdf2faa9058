"""The fine-tuning run: load, train, rank, trim, go on, evaluate, compact, save, read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensikernels import _settings
from sensikernels._checks import require
from sensikernels.hf import apply, load_model, quiet, restore, structure
from sensikernels.masks import Plan, Scores, StepCosts, plan
from sensikernels.masks.latency import check_kinds
from sensikernels.methods.latency import dtype_of, measure_costs
from sensikernels.training import checkpoint
from sensikernels.training.config import DTYPES, Settings
from sensikernels.training.data import Data, model_path
from sensikernels.training.distributed import Part, World, one_for_all
from sensikernels.training.finish import finish, read_report, step_time_ratio
from sensikernels.training.flops import flops_per_token
from sensikernels.training.output import output_folder
from sensikernels.training.runner import Runner, dense_runner, method_runner

PRIMITIVES = 16384
"""Shapes oneDNN may keep compiled: a ranked plan needs more than its default of 1,024."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a watcher is told after each step."""

    step: int
    max_steps: int
    loss: float
    step_ms: Mapping[str, float]
    events: tuple[str, ...]


Watcher = Callable[[Progress], None]


@dataclass(kw_only=True, eq=False)
class Session:
    """A run under way: one or two runners that see the same batches."""

    settings: Settings
    data: Data
    runner: Runner
    dense: Runner | None
    max_steps: int
    dense_flops: float
    epoch: int = 0
    batch: int = 0
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
        """Every remaining epoch, with checkpoints on the way."""
        for epoch in range(self.epoch, self.settings.epochs):
            for part in self.data.parts(epoch, self.batch):
                self._step(part)
                if watch is not None:
                    watch(self._progress())
                if self._checkpoint_is_due():
                    self.save()
            for runner in self.runners:
                runner.evaluate(self.data)
            self.epoch, self.batch = epoch + 1, 0

    def _step(self, part: Part) -> None:
        # Whoever is second finds a warmer cache: take turns.
        order = self.runners if self.step % 2 == 0 else self.runners[::-1]
        self.tokens.append(part.tokens)
        for runner in order:
            batch = self.data.padded(part.batch) if runner is self.dense else part.batch
            runner.step(batch, part.weight)
        self.batch += 1

    def _checkpoint_is_due(self) -> bool:
        every = self.settings.checkpoint_every
        return bool(every) and self.step % every == 0

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
            "tokens": self.tokens,
            "seconds": dict(self.seconds),
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

    def unshard(self) -> None:
        """Put a sharded model together on the first process, as a checkpoint would bring it."""
        old = self.runner
        if not self.data.world.shards(old.model):
            return
        state = old.state()
        if self.data.world.first:
            model = fresh_model(self.settings, self.data)
            new = method_runner(self.settings, self.data, model, self.max_steps)
            for name in ("plan", "scores", "costs"):
                setattr(new.run, name, getattr(old.run, name))
            new.load_state(state)
            new.logits = old.logits
            self.runner = new

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError where it is not one of this run."""
        identity = _identity(self.settings, self.data)
        state, saved_plan = checkpoint.load(folder, settings=identity)
        parts = structure(self.runner.model)
        with checkpoint.matching(folder):
            if state["scores"] is not None:
                self.runner.run.scores = Scores(structure=parts, **state["scores"])
            self.runner.run.plan = saved_plan
            for runner, own in zip(self.runners, state["runners"], strict=True):
                runner.load_state(own)
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.runner.run.events.append(f"step {self.step}: resumed")


def finetune(settings: Settings, watch: Watcher | None = None) -> dict[str, Any]:
    """One fine-tuning run; writes everything into ``settings.output`` and returns the report.

    A run that was finished already is not run again: its report comes back. Under ``torchrun`` the
    processes share every batch; the first one writes, watches, and gives its report to all.

    Raises:
        UsageError: an argument or the budget is wrong, or the output folder is not empty.
        DataError: data or model cannot be read. CheckpointError: as ``checkpoint.load``.
        SensiError: training diverged or the disk refuses.
    """
    start = time.perf_counter()
    world = World.join(settings)
    agree = world.agree
    with quiet(), one_for_all(world), ExitStack() as stack:
        folder = output_folder(settings.output, resume=settings.resume)
        agree(lambda: stack.enter_context(folder))
        done = agree(lambda: read_report(settings)) if settings.resume else None
        if done is not None:
            return done
        session = prepare(settings)
        found = agree(lambda: checkpoint.latest(settings.output)) if settings.resume else None
        if found is not None:
            session.load(found)
        else:
            session.runner.begin()
        session.seconds["setup"] += time.perf_counter() - start
        session.train(watch if world.first else None)
        session.unshard()
        step_time = step_time_ratio(session)
        return agree(lambda: finish(session, step_time, time.perf_counter() - start))


def prepare(settings: Settings) -> Session:
    """Read data and models, and build the runners at step 0."""
    device = use_device(settings)
    data = Data.load(settings, device, World.join(settings))
    model = fresh_model(settings, data)
    max_steps = data.steps_per_epoch * settings.epochs
    runner = method_runner(settings, data, model, max_steps)
    check_budget(settings, model, data)
    dense_flops = data.world.agree(lambda: flops_per_token(model, data))
    dense = None
    if settings.compare_dense:
        dense = dense_runner(settings, data, fresh_model(settings, data), max_steps)
    return Session(
        settings=settings,
        data=data,
        runner=runner,
        dense=dense,
        max_steps=max_steps,
        dense_flops=dense_flops,
    )


def use_device(settings: Settings) -> torch.device:
    """Choose the device and its numerics before the first product runs.

    fp32 on a CPU runs at ``set_float32_matmul_precision("medium")``: bfloat16 products with float32
    accumulation where the CPU has them, as the report says.
    """
    from accelerate import Accelerator

    _settings.reserve_primitive_cache(PRIMITIVES)
    _settings.quiet_profiler()
    accelerator = Accelerator(cpu=settings.device == "cpu")
    device = accelerator.device
    wanted = device.type if settings.device == "auto" else settings.device
    require(device.type == wanted, "device", wanted, f"only {device.type} here")
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
    return device


def fresh_model(settings: Settings, data: Data) -> nn.Module:
    """The pre-trained model with a new classifier, the same at every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        model: Any = load_model(
            model_path(settings.model), labels=data.task.num_labels, dtype=DTYPES[settings.dtype]
        )
    names = dict(enumerate(data.task.label_names))
    if names:
        model.config.id2label = names
        model.config.label2id = {name: index for index, name in names.items()}
    trained: nn.Module = model.to(data.device)
    return trained


def check_budget(settings: Settings, model: nn.Module, data: Data) -> None:
    """Raise UsageError now where trimming would find out later that it cannot be done."""
    if settings.plan is not None:
        apply(model, Plan.load(settings.plan))
        restore(model)
    if settings.budget is None:
        return
    parts = structure(model, str(settings.options.get("granularity", "heads")))
    flat = Scores(
        structure=parts,
        values={c.name: torch.ones(c.units) for c in parts.couplings},
        criterion="none",
        statistic="none",
    )
    timed = settings.budget.step_time is not None
    if timed:
        check_kinds(parts.couplings)
    if timed and settings.costs is None:
        return
    costs = None if settings.costs is None else StepCosts.load(settings.costs)
    if costs is not None:
        costs.check(parts, data.device.type, dtype_of(model))
    multiples = settings.options.get("multiples")
    geometry = data.geometry
    plan(
        flat,
        settings.budget,
        sequence_length=geometry.mean_length,
        tokens_per_sequence=geometry.tokens / geometry.rows,
        attended=geometry.attended,
        multiples=multiples,
        costs=costs,
    )


def step_costs(settings: Settings, progress: Callable[[str], object]) -> StepCosts:
    """Measure what widths cost on this device, for the run that ``settings`` describe."""
    with quiet():
        session = prepare(settings)
    count = session.data.world.size
    require(count == 1, "processes", "1, as others would disturb the clock", count)
    runner = session.runner
    assert runner.run.make_optimizer is not None
    with runner.own_random():
        return measure_costs(
            runner.model, runner.run.batches(), runner.run.make_optimizer, progress=progress
        )


def rank(settings: Settings) -> tuple[Scores, Plan, Runner]:
    """Rank the model's units and allocate the budget, training nothing."""
    with quiet():
        session = prepare(settings)
    run = session.runner.run
    with session.runner.own_random():
        run.max_steps = 0  # the warm-up is a share of the steps: there is none
        session.runner.method.begin(run)
        session.runner.method.begin_step(run)
    if run.scores is None or run.plan is None:
        require(False, "method", "one that ranks", settings.method)
        raise AssertionError
    return run.scores, run.plan, session.runner


def _identity(settings: Settings, data: Data) -> dict[str, Any]:
    return settings.identity() | {"data": data.fingerprint()}


def _scores_state(scores: Scores) -> dict[str, Any]:
    return {name: value for name, value in vars(scores).items() if name != "structure"}
