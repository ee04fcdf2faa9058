"""After the last step: measure, compact, save, read back, report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sensikernels.errors import CheckpointError, SensiError
from sensikernels.glue import compute
from sensikernels.hf import (
    applied,
    compact,
    load_model,
    packing_of,
    restore_dropout,
    restore_packed,
)
from sensikernels.methods.latency import own_rows, time_ratio
from sensikernels.training.config import DTYPES, Settings
from sensikernels.training.flops import flops_per_token
from sensikernels.training.memory import peak_mib
from sensikernels.training.output import (
    CHECKPOINTS,
    REPORT,
    UNFINISHED,
    remove,
    write_json,
    writing,
)
from sensikernels.training.report import Measurements, build
from sensikernels.training.runner import method_runner, predict

if TYPE_CHECKING:
    from sensikernels.training.loop import Session


def read_report(settings: Settings) -> dict[str, Any] | None:
    """The report of a finished run in the output folder, None where it is not finished.

    Raises:
        CheckpointError: the report is unreadable or that of a run with other settings.
    """
    path = settings.output / REPORT
    if not path.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        saved = report["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a report: {error}") from error
    asked = json.loads(json.dumps(settings.identity()))
    for name, value in asked.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{path}: {name}: expected {saved.get(name)!r} as in the finished run, "
                f"got {value!r}"
            )
    return report


def finish(session: Session, step_time: float | None, wall: float) -> dict[str, Any]:
    """Measure and write everything; ``report.json`` last, so that it stands for all the rest."""
    from sensikernels.training.picture import draw

    settings, runner = session.settings, session.runner
    output = settings.output
    run = runner.run
    measured = _measure(session, step_time)
    reload = _save_model(session, output)
    if run.plan is not None:
        _save_plan(session, output)
    if run.scores is not None and run.plan is not None:
        with writing(output / "sensitivity.png") as temporary:
            draw(run.scores, run.plan, temporary)
    session.seconds["wall"] += wall
    report = build(session, measured, reload)
    write_json(output / REPORT, report)
    remove(output / CHECKPOINTS)
    return report


def _measure(session: Session, step_time: float | None) -> Measurements:
    """FLOPs and memory of the models as they are after the last step."""
    data, runner, dense = session.data, session.runner, session.dense
    batch = data.largest()
    return Measurements(
        dense_flops=session.dense_flops,
        flops=flops_per_token(runner.model, data),
        peak=peak_mib(runner.model, runner.run.optimizer, batch),
        dense_peak=None
        if dense is None
        else peak_mib(dense.model, dense.run.optimizer, data.padded(batch)),
        step_time=step_time,
    )


def step_time_ratio(session: Session) -> float | None:
    """The trained model's step over the untrimmed one's, timed in turn; None unless budgeted.

    Every process must call it: they step together. Of shards the first one's process steps alone.
    """
    from sensikernels.training.loop import fresh_model

    settings, run, world = session.settings, session.runner.run, session.data.world
    if run.plan is None or run.plan.budget is None or run.plan.budget.step_time is None:
        return None
    assert run.make_optimizer is not None
    batches = own_rows(run)
    alone = world.size > 1 and world.parallel == "fsdp"
    if alone and not world.first:
        return None
    dense = method_runner(settings, session.data, fresh_model(settings, session.data), 1).model
    planned = copy.deepcopy(run.model)
    if alone:
        return time_ratio(dense, planned, batches, run.make_optimizer)
    return time_ratio(dense, planned, batches, run.make_optimizer,
                      gradients=run.gradients, gather=run.gather)  # fmt: skip


def _save_model(session: Session, output: Path) -> dict[str, Any]:
    """Write ``model/``, load it from there, and compare development logits with the run's own.

    Raises:
        SensiError: what was saved does not compute to the bit what was compacted.
    """
    settings, data, trained = session.settings, session.data, session.runner.logits
    assert trained is not None
    model: Any = session.runner.model
    small: Any = model if applied(model) is None else compact(model)
    if small is model and settings.dropout == "counter":
        restore_dropout(small)
    if packing_of(small) is not None:
        restore_packed(small)
    _let_dense_gradients(small)
    with writing(output / "model") as folder:
        small.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        loaded = load_model(folder, labels=data.task.num_labels, dtype=DTYPES[settings.dtype])
        ours, labels = predict(small, data)
        theirs, _ = predict(loaded.to(data.device), data)
        if not torch.equal(ours, theirs):
            raise SensiError(
                f"{output / 'model'}: expected the saved model's logits bit-equal to the trained "
                f"one's, got a difference of {_gap(ours, theirs):.3g}"
            )
    metric = data.task.main_metric
    return {
        "bit_equal": True,
        "max_difference_to_trained": _gap(ours, trained),
        "class": type(loaded).__name__,
        metric: compute(data.task, theirs, labels)[metric],
        "parameters": sum(p.numel() for p in small.parameters()),
    }


def _save_plan(session: Session, output: Path) -> None:
    """``plan.json`` and its grids: both appear, the JSON last."""
    plan = session.runner.run.plan
    assert plan is not None
    scratch = output / UNFINISHED
    with writing(scratch) as folder:
        folder.mkdir()
        plan.save(folder / "plan.json")
    (scratch / "plan.safetensors").replace(output / "plan.safetensors")
    (scratch / "plan.json").replace(output / "plan.json")
    remove(scratch)


def _let_dense_gradients(model: nn.Module) -> None:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    table.sparse = False


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
