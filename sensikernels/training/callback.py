"""The phases of a method inside any ``transformers.Trainer``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels.data import geometry
from sensikernels.hf import ComputeLoss, applied, computed, structure_of
from sensikernels.hf.callback import TrainerCallback, default_loss
from sensikernels.hf.trained_flops import trained_flops
from sensikernels.masks import Budget, Geometry, Plan, StepCosts
from sensikernels.masks.structure import Structure
from sensikernels.methods import Method, Run, method
from sensikernels.training import checkpoint
from sensikernels.training.distributed import require_same, wrap_anew
from sensikernels.training.output import writing
from sensikernels.training.ranking import Ranking, try_loss
from sensikernels.world import ALONE, World

FOLDER = "sensikernels"
_WRAPPED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU")
_log = logging.getLogger(__name__)


class SensiCallback(TrainerCallback):
    """Warm-up, sensitivity, trim and the rest of the training, as the method says.

        callback = SensiCallback("sensi-bert", budget=Budget(flops=0.5))
        trainer = Trainer(model, args, train_dataset=…, callbacks=[callback])
        trainer.train()
        small = sensikernels.compact(trainer.model)

    ``ranking_rows`` rows of the training set rank the units, collated as the Trainer does, in
    batches of 32; their mean length is the budget's unless ``sequence_length`` is given. Of a
    stream they are its first rows, so it must be one that can be read twice. A model
    may be packed (``use_packed``), with or without ``DataCollatorPacked``. The
    Trainer's own order of rows and dropout do not change. ``dps`` without ``as_published`` needs
    ``optimizers=(SubsetAdamW(…), None)``.

    A callback is not shown how its Trainer takes the loss. The model's own is ranked by, smoothed
    where ``label_smoothing_factor`` is set; for any other, as for labels of other names, give
    ``compute_loss``, a function of model and batch. A batch is tried before the first step.

    A second ``train()``, and a retry with smaller batches, go on with the plan in force. Best-model
    loading counts from the trim on: what was evaluated before is another model.

    A ``step_time`` budget is met by the clock, on steps of the Trainer's kind of optimizer;
    ``costs`` were measured before (``sensikernels tune --costs``), else the run measures them.

    Under ``torchrun`` processes share the ranking, sensitivities are summed, all trim to the plan
    of the first, which also writes it. The Trainer's DDP follows the change of shapes: tell the
    callback of its Trainer before ``train()``, ``callback.attach(trainer)``.
    ``average_tokens_across_devices`` is turned off there: it would multiply the loss, a mean
    already, by the number of processes. FSDP and DeepSpeed under a Trainer are refused;
    ``sensikernels finetune --parallel fsdp`` shards.

    Every Trainer checkpoint gets a folder ``sensikernels/`` beside the weights. To resume, build
    the same model and Trainer, then::

        callback.prepare(model, "out/checkpoint-500")
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    ``Trainer.floating_point_ops`` counts 6·tokens·parameters whatever is trimmed or frozen;
    ``trainer.floating_point_ops = callback.floating_point_ops`` counts what runs.

    Raises:
        UsageError: the method needs a budget and has none. When training begins: the Trainer
            shards its model, or has several processes and was not attached; the batches cannot be
            ranked by; another plan is in force.
    """

    def __init__(
        self,
        method_: str | Method = "sensi-bert",
        *,
        budget: Budget | None = None,
        ranking_rows: int = 256,
        sequence_length: float | None = None,
        costs: StepCosts | None = None,
        compute_loss: ComputeLoss | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.method = method(method_, **options) if isinstance(method_, str) else method_
        needs = self.method.needs_budget
        require(not needs or budget is not None, "budget", f"one for {self.method.name}", "none")
        require(needs or budget is None, "budget", f"none for {self.method.name}", budget)
        own = self.method.has_own_loss
        require(not own, "method", "one that trains by the Trainer's loss", self.method.name)
        require(ranking_rows >= 1, "ranking_rows", "at least 1", ranking_rows)
        self.budget, self.ranking_rows, self.seed = budget, ranking_rows, seed
        self.sequence_length, self.costs, self.compute_loss = sequence_length, costs, compute_loss
        self.run: Run | None = None
        self.world = ALONE
        self._trainer: Any = None
        self._rates: list[Any] | None = None
        self._dense: Structure | None = None
        self._resumed: tuple[Plan | None, Mapping[str, Tensor], int | None] | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan in force, once there is one."""
        return None if self.run is None else self.run.plan

    def attach(self, trainer: Any) -> None:
        """Tell the callback of the Trainer that it is in, or is put into now."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def prepare(self, model: nn.Module, folder: Path | str) -> None:
        """Give a fresh ``model`` the shapes it had when the Trainer wrote ``folder``.

        Call before ``trainer.train(resume_from_checkpoint=folder)``.

        Raises:
            CheckpointError: ``folder`` holds no whole state of this callback's settings.
        """
        _know_numbered_cpus()
        self._dense = structure_of(model)
        state, plan = checkpoint.load(Path(folder) / FOLDER, settings=self._identity())
        if plan is not None:
            self.method.shape(model, plan)
        self._resumed = plan, state["method"], state["trimmed_at"]

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Training FLOPs of one batch under the plan in force."""
        require(self._dense is not None, "callback", "a training that has begun", "none")
        assert self._dense is not None
        assert self.run is not None
        seen = geometry([computed(self.run.model, inputs)])
        dense = self._dense.at(seen)
        length, plan = seen.mean_length, self.plan
        if plan is not None and plan.trainable is not None and not plan.update_masks:
            return round(trained_flops(self.run.model, seen, plan.trainable) * seen.tokens)
        kept = None if plan is None or not plan.weight_masks else plan.kept_counts()
        share = plan.flops_ratio if plan is not None and plan.update_masks else 1.0
        return round(share * dense.flops(length, kept) * seen.tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on from where ``prepare`` left off."""
        world = self.world = _world(args)
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        self._check_wrapper(model)
        ranking = Ranking(loader, rows=self.ranking_rows, seed=self.seed, world=world)
        if self._dense is None:
            self._dense = structure_of(model)
        seen = geometry(computed(model, batch) for batch in ranking)
        given = self.sequence_length
        run = self.run = Run(
            model=model,
            optimizer=kwargs["optimizer"],
            max_steps=state.max_steps,
            batches=lambda: islice(ranking, world.rank, None, world.size),
            geometry=Geometry.uniform(given, seen.attended) if given else seen,
            world=world,
            budget=self.budget,
            make_optimizer=_like(kwargs["optimizer"]),
            compute_loss=self.compute_loss or default_loss(args),
            costs=self.costs,
            seed=self.seed,
            step=state.global_step,
        )
        if self.method.needs_budget:
            try_loss(run, ranking)
        self._begin(run)
        for event in run.events:
            _log.info(event)

    def _check_wrapper(self, model: nn.Module) -> None:
        """Raise UsageError in several processes unless the DDP around ``model`` is known."""
        if self.world.size == 1:
            return
        known = self._trainer is not None
        require(known, "trainer", "callback.attach(trainer) before train()", "none")
        wrapper = self._trainer.model_wrapped
        fits = isinstance(wrapper, DistributedDataParallel) and wrapper.module is model
        require(fits, "trainer", "its model in DistributedDataParallel", type(wrapper).__name__)

    def _begin(self, run: Run) -> None:
        """Start the method, or go on with the plan in force. Raises UsageError: it is another's."""
        resumed, self._resumed = self._resumed, None
        swap = applied(run.model)
        if resumed is not None:
            run.plan, tensors, run.trimmed_at = resumed
            if swap is None or tensors:
                with self._followed(run):
                    self.method.resume(run, tensors)
        elif swap is None:
            with self._followed(run):
                self.method.begin(run)
        else:
            same = (swap.plan.method, swap.plan.budget) == (self.method.name, self.budget)
            expected = f"no plan, or one of {self.method.name} for {self.budget}"
            got = f"one of {swap.plan.method} for {swap.plan.budget} (restore first)"
            require(same, "model", expected, got)
            run.plan = swap.plan

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rank and trim when the method's moment has come."""
        run, plan = self._at(state), self.plan
        with torch.random.fork_rng(_devices(run.model)), self._followed(run):
            self.method.begin_step(run)
        if run.plan is not None and run.plan is not plan and run.plan.weight_masks:
            _forget_best(args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are ready; the step's learning rate is the schedule's times the method's."""
        run = self._at(state)
        self.method.before_step(run)
        groups, factor = run.optimizer.param_groups, self.method.rate_factor(run)
        self._rates = [group["lr"] for group in groups] if factor != 1 else None
        for group in groups if self._rates else ():
            group["lr"] = group["lr"] * factor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The learning rates are the schedule's again, which goes on from them."""
        rates, self._rates = self._rates, None
        for group, rate in zip(self._at(state).optimizer.param_groups, rates or (), strict=False):
            group["lr"] = rate

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put plan and method state beside the Trainer's checkpoint."""
        run = self._at(state)
        if not self.world.first:
            return
        target = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
        with writing(target) as folder:
            content = {"method": self.method.state(), "trimmed_at": run.trimmed_at}
            checkpoint.write(folder, run.step, content, settings=self._identity(), plan=run.plan)

    @contextmanager
    def _followed(self, run: Run) -> Iterator[None]:
        """Have every process, and DDP, follow a plan that the method makes inside the block."""
        plan = run.plan
        yield
        if run.plan is not plan:
            require_same(self.world, run.plan)
            if self.world.size > 1:
                wrap_anew(self._trainer.model_wrapped)

    def _at(self, state: Any) -> Run:
        assert self.run is not None
        self.run.step = state.global_step
        return self.run

    def _identity(self) -> dict[str, Any]:
        options = {
            k: list(v) if isinstance(v, tuple) else v for k, v in self.method.options().items()
        }
        budget = None if self.budget is None else self.budget.to_json()
        return {"method": self.method.name, "options": options, "budget": budget}


def _forget_best(args: Any, state: Any) -> None:
    """The best model so far has other shapes and another loss: the best is sought anew."""
    if state.best_model_checkpoint is not None or state.best_metric is not None:
        if args.load_best_model_at_end:
            _log.warning(
                "step %d: trimmed; best-model loading counts from here on, as %s was untrimmed",
                state.global_step,
                state.best_model_checkpoint,
            )
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None


def _world(args: Any) -> World:
    """The Trainer's processes. Raises UsageError where they do not hold whole models."""
    from accelerate.state import AcceleratorState

    kind = AcceleratorState().distributed_type.name
    if kind not in _WRAPPED:
        raise UsageError(
            f"parallel: expected DDP or one process under a Trainer, got {kind}; `sensikernels "
            "finetune --parallel fsdp` trains shards"
        )
    if args.world_size > 1 and args.average_tokens_across_devices:
        args.average_tokens_across_devices = False
        _log.warning("average_tokens_across_devices: off, as the loss is a mean already")
    return World(rank=args.process_index, size=args.world_size)


def _like(optimizer: Any) -> Callable[[nn.Module], Optimizer]:
    """Makes a model an optimizer of this kind and these defaults, to time steps with."""
    inner = getattr(optimizer, "optimizer", optimizer)
    taken = inspect.signature(type(inner)).parameters
    named = {name: value for name, value in inner.defaults.items() if name in taken}

    def make(model: nn.Module) -> Optimizer:
        made: Optimizer = type(inner)([p for p in model.parameters() if p.requires_grad], **named)
        return made

    return make


@cache
def _know_numbered_cpus() -> None:
    """Let ``torch.load`` map to "cpu:1": so accelerate calls the CPU of a second process."""
    torch.serialization.register_package(
        11, lambda _: None, lambda storage, at: storage if at.startswith("cpu:") else None
    )


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
