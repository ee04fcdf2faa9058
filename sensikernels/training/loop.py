"""The fine-tuning run: load, train, rank, trim, go on, evaluate, compact, save, read back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from sensikernels._core import environment
from sensikernels._core.checks import require
from sensikernels._core.errors import SensiError, UsageError
from sensikernels._core.files import one_line
from sensikernels._core.products import float32_products
from sensikernels.hf import quiet, structure_of
from sensikernels.masks import Plan, Scores, StepCosts
from sensikernels.methods.step_time import measure_costs
from sensikernels.training import checkpoint
from sensikernels.training.config import Settings
from sensikernels.training.data import Data
from sensikernels.training.distributed import device_kind, join, one_for_all
from sensikernels.training.end import check_end
from sensikernels.training.finish import finish, read_report, step_time_ratio
from sensikernels.training.flops import flops_per_token
from sensikernels.training.output import output_folder
from sensikernels.training.ready import check_budget, check_model
from sensikernels.training.runner import Runner, dense_runner, method_runner
from sensikernels.training.session import Session, Watcher, fresh_model
from sensikernels.training.trackers import tracking


def finetune(
    settings: Settings, watch: Watcher | None = None, *, data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One fine-tuning run; writes everything into ``settings.output`` and returns the report.

    ``data``: with ``task="given"`` the rows themselves, as a mapping of ``train`` and ``dev`` (or
    ``validation``, as a ``DatasetDict`` has) to a ``datasets.Dataset`` or ``data.Examples``; the
    settings' columns say which are meant.

    A run that was finished already is not run again: its report comes back. Under ``torchrun`` the
    processes share every batch; the first one writes, watches, and gives its report to all.

    Raises:
        UsageError: an argument or the budget is wrong, or the output folder is not empty.
        DataError: data or model cannot be read. CheckpointError: as ``checkpoint.load``.
        SensiError: training diverged or the disk refuses.
    """
    start = time.perf_counter()
    world = join(settings)
    agree = world.agree
    with quiet(), one_for_all(world), numerics(settings), ExitStack() as stack:
        folder = output_folder(settings.output, resume=settings.resume)
        agree(lambda: stack.enter_context(folder))
        done = agree(lambda: read_report(settings)) if settings.resume else None
        if done is not None:
            return done
        session = prepare(settings, data)
        session.start = start
        agree(lambda: check_end(session))
        found = agree(lambda: checkpoint.latest(settings.output)) if settings.resume else None
        if found is not None:
            session.load(found)
        else:
            session.runner.begin()
        session.seconds["setup"] += time.perf_counter() - start
        names = settings.report_to if world.first else ()
        config = settings.to_json()
        tracked = tracking(names, settings.output, config, session.step)
        agree(lambda: setattr(session, "log", stack.enter_context(tracked)))
        with _kept(session):
            session.train(watch if world.first else None)
            session.unshard()
            step_time = step_time_ratio(session)
            return agree(lambda: finish(session, step_time))


@contextmanager
def _kept(session: Session) -> Iterator[None]:
    """Name the folder of the trained model if something fails after the last step."""
    try:
        yield
    except Exception as error:
        output = session.settings.output
        where = checkpoint.latest(output) if session.done else None
        if where is None:
            raise
        raise SensiError(
            f"{one_line(error)}; training is done and kept in {where}: --resume goes on from there"
        ) from error


def prepare(settings: Settings, given: Mapping[str, Any] | None = None) -> Session:
    """Read data and models, and build the runners at step 0."""
    fits = given is None or settings.task == "given"
    require(fits, "data", f"none for task {settings.task}", "some (task given takes them)")
    world = join(settings)
    device = use_device(settings)
    data = Data.load(settings, device, world, given)
    model = fresh_model(settings, data)
    max_steps = math.ceil(data.steps_per_epoch * settings.epochs)
    method = settings.make_method()
    check_model(settings, method, model, data)
    runner = method_runner(settings, data, model, max_steps)
    runner.run.events += data.notes
    structure = structure_of(model).at(data.geometry)
    check_budget(settings, method, model, data)
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
        structure=structure,
    )


def numerics(settings: Settings) -> AbstractContextManager[None]:
    """The products of a run of ``settings``: around everything that it computes."""
    return float32_products(device_kind(settings))


def use_device(settings: Settings) -> torch.device:
    """The device that ``settings`` ask for. Raises UsageError where another one runs already."""
    from accelerate import PartialState

    environment.quiet_profiler()
    kind = device_kind(settings)
    device: torch.device = PartialState(cpu=kind == "cpu").device
    require(device.type == kind, "device", f"{kind}, as nothing else runs here", device.type)
    return device


def step_costs(
    settings: Settings,
    progress: Callable[[str], object],
    *,
    data: Mapping[str, Any] | None = None,
) -> StepCosts:
    """Measure what widths cost on this device, for the run that ``settings`` describe."""
    with numerics(settings):
        with quiet():
            session = prepare(settings, data)
        count = session.data.world.size
        require(count == 1, "processes", "1, as others would disturb the clock", count)
        runner = session.runner
        assert runner.run.make_optimizer is not None
        with runner.own_random():
            return measure_costs(
                runner.model, runner.run.batches(), runner.run.make_optimizer, progress=progress
            )


def rank(
    settings: Settings, *, data: Mapping[str, Any] | None = None
) -> tuple[Scores, Plan, Runner]:
    """Rank the model's units and allocate the budget, training nothing."""
    with numerics(settings):
        with quiet():
            session = prepare(settings, data)
        run = session.runner.run
        with session.runner.own_random():
            run.max_steps = 0  # the warm-up is a share of the steps: there is none
            session.runner.method.begin(run)
            session.runner.method.begin_step(run)
    if run.scores is None or run.plan is None:
        raise UsageError(f"method: expected one that ranks, got {settings.method}")
    return run.scores, run.plan, session.runner
