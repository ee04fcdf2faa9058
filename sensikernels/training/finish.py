"""After the last step: measure, compact, save, read back, report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sensikernels._core.errors import CheckpointError, SensiError
from sensikernels._core.files import one_line, read_json
from sensikernels._core.products import medium_rounds
from sensikernels.data import compute
from sensikernels.hf import (
    applied,
    compact,
    load_model,
    packing_of,
    restore_dropout,
    restore_packed,
)
from sensikernels.hf.model_folder import write_digests
from sensikernels.masks import Plan, Scores
from sensikernels.methods.step_time import own_rows, time_ratio
from sensikernels.training import checkpoint
from sensikernels.training.config import AUTOCAST, DTYPES, Settings
from sensikernels.training.flops import flops_per_token
from sensikernels.training.memory import peak_mib
from sensikernels.training.output import (
    CHECKPOINTS,
    REPORT,
    remove,
    write_json,
    writing,
)
from sensikernels.training.predict import predict
from sensikernels.training.report import Measurements, build
from sensikernels.training.runner import method_runner
from sensikernels.training.session import Session, fresh_model

T = TypeVar("T")


def read_report(settings: Settings) -> dict[str, Any] | None:
    """The report of a finished run in the output folder, None where it is not finished.

    What a kill after the report left behind goes.

    Raises:
        CheckpointError: the report is unreadable or that of a run with other settings.
    """
    path = settings.output / REPORT
    if not path.exists():
        return None
    try:
        report: dict[str, Any] = read_json(path)
        saved, failed = report["settings"], list(report["failed"])
        asked = json.loads(json.dumps(settings.identity()))
        for name, value in asked.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"{path}: {name}: expected {saved.get(name)!r} as in the finished run, "
                    f"got {value!r}"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a report: {one_line(error)}") from error
    if failed and checkpoint.latest(settings.output) is not None:
        return None  # its end is done again
    remove(settings.output / CHECKPOINTS)
    return report


class Attempts(list[str]):
    """The failures at the end of a run, a line each; the rest is done all the same."""

    def __call__(self, what: str, make: Callable[[], T]) -> T | None:
        """The result of ``make``; None, and a line, if it fails in whatever way."""
        try:
            return make()
        except Exception as error:
            reason = one_line(error)
            self.append(reason if what in reason else f"{what}: {reason}")
            return None


def finish(session: Session, step_time: float | None) -> dict[str, Any]:
    """Measure and write everything; ``report.json`` last, so that it stands for all the rest.

    Raises:
        SensiError: a part failed, which the report names; the last checkpoint stays then.
    """
    from sensikernels.training.picture import draw

    output, run = session.settings.output, session.runner.run
    attempt = Attempts()
    trainable = sum(p.numel() for p in session.runner.model.parameters() if p.requires_grad)
    measured = attempt("measurement", lambda: _measure(session, step_time))
    small = attempt("model", lambda: _save_model(session, output / "model"))
    saved = attempt("model", lambda: _read_back(session, small, output / "model", attempt))
    plan, scores = run.plan, run.scores
    if plan is not None:
        attempt("plan.json", lambda: plan.save(output / "plan.json"))
    if (path := session.settings.predict) is not None:
        attempt(path.name, lambda: _write_predictions(session, path))
    if scores is not None and plan is not None:
        with_name = output / "sensitivity.png"
        attempt(with_name.name, lambda: _draw(draw, scores, plan, with_name))
    report = build(
        session,
        measured or Measurements(),
        {"trainable": trainable, **(saved or {})},
        failed=list(attempt),
    )
    write_json(output / REPORT, report)
    if attempt:
        raise SensiError("; ".join(attempt))
    remove(output / CHECKPOINTS)
    return report


def _draw(draw: Callable[[Scores, Plan, Path], None], scores: Scores, plan: Plan, to: Path) -> None:
    with writing(to) as temporary:
        draw(scores, plan, temporary)


def _write_predictions(session: Session, path: Path) -> None:
    """The trained model's predictions of the development rows, as its metrics count them."""
    data, outputs = session.data, session.runner.logits
    text = data.kind.predictions(
        data.task, outputs, session.runner.truth, data.dev_order, path.suffix.lower()
    )
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _measure(session: Session, step_time: float | None) -> Measurements:
    """FLOPs and memory of the models as they are after the last step."""
    data, runner, dense = session.data, session.runner, session.dense
    _fill_cache(session)
    batch = data.largest()
    with runner.amp.autocast():
        peak = peak_mib(runner.model, runner.run.optimizer, batch, accumulate=data.accumulate)
        dense_peak = None
        if dense is not None:
            padded, held = data.padded(batch), dense.run.optimizer
            dense_peak = peak_mib(dense.model, held, padded, accumulate=data.accumulate)
    return Measurements(
        flops=flops_per_token(runner.model, data),
        peak=peak,
        dense_peak=dense_peak,
        step_time=step_time,
    )


@torch.no_grad()
def _fill_cache(session: Session) -> None:
    """A run that was resumed keeps the prefix of every sentence again, as one that was not."""
    model: Any = session.runner.model
    resumed = any(event.endswith(": resumed") for event in session.runner.run.events)
    if not resumed or not any(getattr(m, "prefix_cache", None) for m in model.modules()):
        return
    training = model.training
    model.eval()
    for batch in session.data.epoch(0):
        model(**batch)
    model.train(training)


def step_time_ratio(session: Session) -> float | None:
    """The trained model's step over the untrimmed one's, timed in turn; None unless budgeted.

    Every process must call it: they step together. Of shards the first one's process steps alone.
    """
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
    return time_ratio(dense, planned, batches, run.make_optimizer, world=world)


def _save_model(session: Session, folder: Path) -> Any:
    """Write ``model/``: the trained model as a plain HuggingFace one, which comes back."""
    settings, model = session.settings, session.runner.model
    session.runner.method.end(session.runner.run)
    small: Any = model if applied(model) is None else compact(model)
    if small is model and settings.dropout == "counter":
        restore_dropout(small)
    if packing_of(small) is not None:
        restore_packed(small)
    _let_dense_gradients(small)
    with writing(folder) as temporary:
        small.save_pretrained(temporary)
        session.data.tokenizer.save_pretrained(temporary)
        write_digests(temporary)
    return small


def _read_back(session: Session, small: Any, folder: Path, failed: list[str]) -> dict[str, Any]:
    """Load ``model/`` and compare its tensors to the bit, its logits to rounding.

    Two computations of the same numbers need not agree to the bit: memory is aligned otherwise.
    What differs is a line of ``failed``; the folder stays.
    """
    if small is None:
        return {}
    settings, data, trained = session.settings, session.data, session.runner.logits
    assert trained is not None
    task = data.task
    loaded = load_model(
        folder,
        labels=task.num_labels,
        dtype=DTYPES[settings.dtype],
        head=task.kind,
        problem=task.problem,
    )
    ours, theirs = small.state_dict(), loaded.state_dict()
    other = [name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))]
    if other:
        failed.append(f"{folder}: expected the trained model's tensors, got others: {other[:3]}")
    with session.runner.amp.autocast():
        mine, labels = predict(small, data)
        read, _ = predict(loaded.to(data.device), data)
    products = AUTOCAST.get(settings.dtype, DTYPES[settings.dtype])
    gap, limit = _gap(mine, read), rounding(data.device, products, mine)
    if not gap <= limit:
        failed.append(
            f"{folder}: expected its logits within {limit:.2g} of the trained model's, "
            f"got a difference of {gap:.3g}"
        )
    metric = task.main_metric
    return {
        "bit_equal": not other,
        "max_difference_reloaded": gap,
        "tolerance": limit,
        "max_difference_to_trained": _gap(mine, trained),
        "class": type(loaded).__name__,
        metric: compute(task, read, labels)[metric],
        "parameters": sum(p.numel() for p in small.parameters()),
    }


def rounding(device: torch.device, dtype: torch.dtype, logits: Tensor) -> float:
    """The largest difference that rounding may make between two computations of the logits.

    64 steps of the coarsest number that products are rounded to, at the size of the largest logit.
    """
    coarse = [torch.finfo(dtype).eps]
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda" and precision != "highest":
        coarse.append(2.0**-10)  # TF32
    if device.type == "cpu" and precision == "medium" and medium_rounds():
        coarse.append(torch.finfo(torch.bfloat16).eps)
    return 64 * max(coarse) * max(1.0, float(logits.abs().max()))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """True if two tensors are the same bits."""
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.cpu(), other.cpu())


def _let_dense_gradients(model: nn.Module) -> None:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    table.sparse = False


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
