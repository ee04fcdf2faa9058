"""The figures of a finished run, as one plain dictionary."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sensikernels.training.runner import Runner
from sensikernels.training.session import Session

PACKAGES = ("sensikernels", "torch", "transformers", "accelerate", "triton", "numpy", "datasets")


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """FLOPs per token and peak MiB of a step, measured after the last one; None: not measured.

    ``step_time``: the planned step over the dense one, timed where that was the budget.
    """

    flops: float | None = None
    peak: float | None = None
    dense_peak: float | None = None
    step_time: float | None = None


def build(
    session: Session, measured: Measurements, saved: dict[str, Any], *, failed: list[str]
) -> dict[str, Any]:
    """``report.json``: shares and per-token FLOPs, milliseconds, MiB, seconds, metrics as shares.

    ``step_ms.planned`` is the median over the steps after the plan took effect, ``dense`` the
    baseline's median over the same steps, run in turn with them; ``step_speedup`` their ratio.
    ``tokens_per_s`` is the median too, of real tokens, without padding. ``params``: ``dense`` and
    ``planned`` outside the embeddings, ``total`` and ``trainable`` of the whole model as it trained
    last. ``saved``: what is known of the model folder; ``failed``: what went wrong at the end.
    """
    runner, dense = session.runner, session.dense
    settings, task = session.settings, session.data.task
    return {
        "task": task.name,
        "task_title": task.title,
        "labels": _labels(session),
        "method": runner.name,
        "budget": _budget(session, measured),
        "flops_per_token": {
            "dense": session.dense_flops,
            "planned": _planned_flops(session),
            "measured": measured.flops,
        },
        "params": _params(session, saved),
        **_speed(session),
        "peak_mib": {"dense": measured.dense_peak, "planned": measured.peak},
        "seconds": {
            **_of_both(session, _seconds),
            "setup": session.seconds["setup"],
            "wall": session.wall(),
        },
        "metric": {
            "name": task.main_metric,
            "value": _value(session, runner),
            "dense_value": None if dense is None else _value(session, dense),
        },
        "metrics": _of_both(session, lambda one: one.epochs),
        "evaluated_at": runner.evaluated_at,
        "evaluated_after": _of_both(session, lambda one: one.evaluated_after),
        "best": _of_both(session, lambda one: one.best.to_json()),
        "skipped_steps": _of_both(session, lambda one: one.amp.skipped),
        "stopped_early_at": session.stopped_at,
        "saved_model": {k: v for k, v in saved.items() if k != "trainable"},
        "failed": failed,
        "data": _data(session),
        "seed": settings.seed,
        "schedule": _of_both(session, lambda one: one.schedule.to_json(session.max_steps)),
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "settings": settings.to_json(),
        "numerics": _numerics(session),
        "versions": versions(),
        "kept": runner.run.plan.kept_counts() if runner.run.plan else {},
        "events": runner.run.events,
        "losses": _of_both(session, lambda one: one.losses),
    }


def _speed(session: Session) -> dict[str, Any]:
    """Milliseconds and tokens per second of the steps after the plan took effect."""
    since = session.runner.changed_at
    steps = slice(since, None)
    ms = _of_both(session, lambda one: statistics.median(one.step_ms[steps]))
    return {
        "step_ms": ms,
        "step_speedup": None if ms["dense"] is None else ms["dense"] / ms["planned"],
        "steps": {"total": session.step, "timed_from": since},
        "tokens_per_s": _of_both(session, lambda one: _throughput(session, one, steps)),
    }


def _of_both(session: Session, fact: Callable[[Runner], Any]) -> dict[str, Any]:
    """A fact of the planned run, and of the dense baseline where there is one."""
    dense = session.dense
    return {
        "planned": fact(session.runner),
        "dense": None if dense is None else fact(dense),
    }


def _value(session: Session, runner: Runner) -> float | None:
    """The main metric of the last evaluation, with ``keep_best`` of the best."""
    if session.settings.keep_best:
        return runner.best.value
    return runner.epochs[-1][session.data.task.main_metric]


def _budget(session: Session, measured: Measurements) -> dict[str, Any]:
    plan = session.runner.run.plan
    budget = session.settings.budget if plan is None else plan.budget
    return {
        "measure": None if budget is None else budget.measure,
        "requested": None if budget is None else budget.requested,
        "scope": None if budget is None else budget.scope,
        "params_scope": None if budget is None else budget.params_scope,
        "flops_ratio_planned": 1.0 if plan is None else plan.flops_ratio,
        "flops_ratio_measured": None
        if measured.flops is None
        else measured.flops / session.dense_flops,
        "params_ratio": 1.0 if plan is None else plan.params_ratio,
        "params_ratio_of_model": _of_model(session),
        "step_time_ratio_measured": measured.step_time,
    }


def _of_model(session: Session) -> float:
    """Planned over dense parameters, embeddings counted."""
    plan, dense = session.runner.run.plan, session.structure.params()
    beside = session.structure.embedding_params
    planned = plan.params_planned if plan is not None and plan.params_planned else dense
    return (planned + beside) / (dense + beside)


def _planned_flops(session: Session) -> float:
    plan = session.runner.run.plan
    if plan is not None and plan.flops_planned:
        return plan.flops_planned
    return session.structure.flops(session.data.geometry.mean_length)


def _params(session: Session, saved: dict[str, Any]) -> dict[str, Any]:
    plan = session.runner.run.plan
    dense = session.structure.params()
    return {
        "dense": dense,
        "planned": plan.params_planned if plan is not None and plan.params_planned else dense,
        "total": saved.get("parameters"),
        "trainable": saved["trainable"],
    }


def _throughput(session: Session, runner: Runner, steps: slice) -> float:
    pairs = zip(session.tokens[steps], runner.step_ms[steps], strict=True)
    return statistics.median(tokens / ms for tokens, ms in pairs) * 1e3


def _seconds(runner: Runner) -> dict[str, float]:
    """``to_finish``: all that this model cost once data and weights were in memory."""
    own = {"train": sum(runner.step_ms) / 1e3, **runner.seconds}
    return {**own, "to_finish": sum(own.values())}


def _labels(session: Session) -> dict[str, Any]:
    """What is labelled and how, and the lines that say what was inferred from the rows."""
    task = session.data.task
    problem = "single_label_classification" if task.kind == "sequences" else None
    return {
        "kind": task.kind,
        "problem": task.problem or problem,
        "names": list(task.label_names),
        "inferred": list(session.data.notes),
    }


def _data(session: Session) -> dict[str, Any]:
    geometry = session.data.geometry
    return {
        "train_rows": len(session.data.train.order.lengths),
        "dev_rows": len(session.data.dev.order.lengths),
        "mean_length": geometry.mean_length,
        "padding": geometry.padding,
        "shapes": len(geometry.shapes),
        "fingerprint": session.data.fingerprint(),
    }


def _numerics(session: Session) -> dict[str, Any]:
    device = session.data.device
    cpu = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({cpu})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": session.data.world.size,
        "dtype": session.settings.dtype,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "learning_rate": {
            "planned": session.runner.learning_rate,
            "dense": None if session.dense is None else session.dense.learning_rate,
        },
        "schedule": session.runner.schedule.name,
        "optimizer": type(session.runner.run.optimizer).__name__,
        "method_options": {k: str(v) for k, v in session.runner.method.options().items()},
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what the figures depend on; None where absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
