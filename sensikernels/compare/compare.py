"""Several methods on one task: their metric, what each costs, and a picture of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from sensikernels._core.checks import require
from sensikernels._core.files import write_json, writing
from sensikernels.bench.rows import provenance
from sensikernels.compare.contestant import Contestant, contestants
from sensikernels.compare.latency import latencies
from sensikernels.compare.picture import draw
from sensikernels.compare.runs import Progress, Results, model_folders, run_all
from sensikernels.compare.summary import lines, to_json
from sensikernels.data import get_task
from sensikernels.methods import BASELINE
from sensikernels.training import Settings
from sensikernels.training.distributed import device_kind

FILE, PICTURE = "compare.json", "compare.png"
FACTORS = (0.5, 1.0, 2.0)
HELD_OUT = 1000


def compare(
    common: Settings,
    methods: Sequence[str],
    *,
    once: Sequence[str] = (),
    seeds: int = 3,
    factors: Sequence[float] = FACTORS,
    held_out: int = HELD_OUT,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Run every contestant on ``common``'s task and say what each reaches and costs.

    ``methods``: ``METHOD[@SHARE][/EPOCHS][:OPTION=VALUE]…[:lr=RATE]``, or ``hf``, the stock model
    on padded batches of like length; ``once``: more of them, for the first seed alone. ``common``
    has the data, the model and the rest of the training; its method, budget, options and learning
    rates are not used. Learning rates are each method's own times one of ``factors``, chosen on
    ``held_out`` training rows that share no text with those trained on, never on the development
    rows, which only the runs of the ``seeds`` that follow see.

    ``common.output`` gets ``compare.json`` after each run, ``compare.png`` at the end, and a folder
    for each run, so that the same call goes on where one was cut off. Returns what the file holds.

    Raises:
        UsageError: a contestant is none, or a number out of range; what ``finetune`` raises, too.
    """
    asked = contestants(methods, once)
    require(type(seeds) is int and seeds >= 1, "seeds", "at least 1", seeds)
    known = bool(factors) and all(0 < factor < 1e6 for factor in factors)
    require(known, "rate_factors", "numbers above 0", list(factors))
    require(type(held_out) is int and held_out >= 1, "held_out", "at least 1", held_out)
    drawn = find_spec("matplotlib") is not None
    require(drawn, PICTURE, "matplotlib installed", "none: pip install 'sensikernels[demo]'")
    _check_all(common, asked)
    common.output.mkdir(parents=True, exist_ok=True)
    choice = {"factors": list(factors), "held_out": held_out if len(factors) > 1 else None}
    content: dict[str, Any] = {}
    results = Results()
    for results in run_all(
        common, asked, seeds=seeds, factors=factors, held_out=held_out, progress=progress
    ):
        content = _write(common, asked, results, choice, {})
    progress("latency of the models")
    folders = model_folders(common, asked)
    first = {name: results.reports[name][0] for name in folders}
    latency = latencies(folders, common, next(iter(first.values()))) if folders else {}
    content = _write(common, asked, results, choice, latency)
    shown = lines(content["contestants"])
    metric = f"{content['task_title']}, dev {content['metric']}, points"
    with writing(common.output / PICTURE) as temporary:
        draw(content["contestants"], shown, metric, temporary)
    return content


def _check_all(common: Settings, asked: Sequence[Contestant]) -> None:
    """Settings that cannot be are found before the first run."""
    for one in asked:
        one.settings(common, {one.side: one.default_rate}).make_method()


def _write(
    common: Settings,
    asked: Sequence[Contestant],
    results: Results,
    choice: Mapping[str, Any],
    latency: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    task = get_task(common.task)
    reports = [report for several in results.reports.values() for report in several]
    settings = common.to_json()
    for name in ("method", "budget", "options", "lr", "dense_lr", "output", "data_dir"):
        settings.pop(name)
    content = {
        "task": task.name,
        "task_title": task.title,
        "metric": reports[0]["metric"]["name"] if reports else None,
        "baseline": BASELINE.name,
        "settings": settings,
        "choice": choice,
        "contestants": to_json(asked, results, latency),
        "provenance": provenance(device_kind(common)),
    }
    write_json(common.output / FILE, content)
    return content
