"""Accuracy against time: dense HuggingFace, ours dense, ours under budgets, step by step in turn.

SST-2 (or the generated demo task without ``data_dir``), MiniLM, batches of 32. HuggingFace trains
one epoch, its batches drawn at random and padded to their longest row; the others train on the
same batches, packed, as ``PLANS`` says, their steps spread evenly over HuggingFace's. A clock
counts all that a contestant does for its own sake: sensitivity, trimming, steps. Data, weights and
evaluation are left out for everybody. Time to accuracy: the clock at the first evaluation that
reaches HuggingFace's last one, as for HuggingFace itself; at that accuracy (tolerance 0) and at a
point less, for every seed and on the mean of all seeds' curves: 872 development rows have a
standard error of 1.1 points.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from sensikernels._core.checks import require_one_of
from sensikernels._core.products import float32_products
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import summarize
from sensikernels.data import Batches
from sensikernels.masks import Budget
from sensikernels.training import Settings
from sensikernels.training.data import Data
from sensikernels.training.loop import prepare, use_device
from sensikernels.training.runner import Runner, dense_runner
from sensikernels.training.session import fresh_model

TOLERANCES = (0, 1)
"""Points below HuggingFace's last accuracy."""
EVALUATIONS = 8
STEPS_BETWEEN = 64
"""Steps of HuggingFace between two evaluations, at least."""
BASELINE = "hf-dynamic"
BASELINE_RATE = 1e-4
"""Chosen, as every setting here, on 2,400 training rows held out, no phrase of whose sentences was
trained on: dense 86.7 % (2e-4: 86.2), half the FLOPs for 1.6 epochs 86.8 % (2e-4: 86.0)."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The ``Settings`` of a contestant that differ from the others', and its epochs."""

    settings: Mapping[str, Any]
    epochs: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the row."""
        budget = self.settings.get("budget")
        plain = {} if budget is None else {"budget": budget.to_json()}
        return {**self.settings, **plain, "epochs": self.epochs}


PLANS: dict[str, Entry] = {
    "dense": Entry(settings={"method": "dense", "lr": BASELINE_RATE}),
    "sensi-bert-0.5": Entry(
        settings={
            "method": "sensi-bert",
            "budget": Budget(flops=0.5),
            "lr": 1e-4,
        },
        epochs=1.6,
    ),
    "bitfit": Entry(settings={"method": "bitfit"}),
    "dps": Entry(settings={"method": "dps", "lr": BASELINE_RATE}),
}


@dataclass(kw_only=True, eq=False)
class Racer:
    """A runner, its batches and its curve of ``(seconds, metric)``."""

    runner: Runner
    data: Data
    batches: Iterator[dict[str, Tensor]]
    curve: Curve = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of training and ranking so far."""
        return sum(self.runner.step_ms) / 1e3 + self.runner.seconds["rank"]

    def advance(self, share: float) -> None:
        """Train until ``share`` of the steps are done."""
        run = self.runner.run
        while run.step < round(share * run.max_steps):
            self.runner.step(next(self.batches))

    def evaluate(self) -> None:
        """A point of the curve."""
        metric = self.runner.evaluate(self.data)[self.data.task.main_metric]
        self.curve.append((self.seconds, metric))


def run(
    *,
    device: str,
    quick: bool,
    progress: Callable[[str], None],
    data_dir: Path | None = None,
    only: str | None = None,
    seeds: int | None = None,
    samples: int | None = None,
) -> list[Row]:
    """Rows of accuracy and time to accuracy, with every seed's curve and the baseline's.

    ``only``: names of ``PLANS``, separated by commas; HuggingFace always runs. ``seeds`` (3, quick
    1) counts the repetitions, ``samples`` (20,000, quick 960) the training rows.
    """
    names = list(PLANS) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        require_one_of(name, "only", PLANS)
    seeds = seeds or (1 if quick else 3)
    samples = samples or (960 if quick else 20_000)
    curves: list[dict[str, Curve]] = []
    rows: list[Row] = []
    for seed in range(seeds):
        with float32_products(device):
            curves.append(_one_seed(seed, names, device, samples, data_dir, progress))
        # Of every seed so far: a run cut short keeps them.
        rows = _rows(curves, "demo" if data_dir is None else "sst2", samples)
    return rows


def _one_seed(
    seed: int,
    names: Sequence[str],
    device: str,
    samples: int,
    data_dir: Path | None,
    progress: Callable[[str], None],
) -> dict[str, Curve]:
    common = Settings(
        task="demo" if data_dir is None else "sst2",
        data_dir=data_dir,
        output=Path(),
        method="dense",
        lr=BASELINE_RATE,
        max_train_samples=samples,
        seed=seed,
        device=device,
    )
    racers = {BASELINE: _hugging_face(common)}
    racers |= {name: _ours(common, PLANS[name]) for name in names}
    for racer in racers.values():
        racer.runner.begin()
    steps = racers[BASELINE].runner.run.max_steps
    points = max(1, min(EVALUATIONS, steps // STEPS_BETWEEN))
    marks = {round(steps * (i + 1) / points) for i in range(points)}
    order = list(racers)
    for step in range(1, steps + 1):
        # Whoever is second finds a warmer cache: take turns.
        for name in order[step % len(order) :] + order[: step % len(order)]:
            racers[name].advance(step / steps)
        if step in marks:
            for racer in racers.values():
                racer.evaluate()
            state = ", ".join(
                f"{n} {100 * r.curve[-1][1]:.1f} % in {r.curve[-1][0]:.0f} s"
                for n, r in racers.items()
            )
            progress(f"seed {seed}, step {step} of {steps}: {state}")
    return {name: racer.curve for name, racer in racers.items()}


def _hugging_face(settings: Settings) -> Racer:
    data = _shuffled(Data.load(settings, use_device(settings)), settings, packed=False)
    steps = data.steps_per_epoch
    runner = dense_runner(settings, data, fresh_model(settings, data), steps)
    return Racer(runner=runner, data=data, batches=data.epoch(0))


def _ours(common: Settings, entry: Entry) -> Racer:
    given = {"lr": None, **entry.settings, "epochs": entry.epochs}
    session = prepare(replace(common, **given))
    data = _shuffled(session.data, common, packed=True)
    batches = (batch for epoch in count() for batch in data.epoch(epoch))
    return Racer(runner=session.runner, data=data, batches=batches)


def _shuffled(data: Data, settings: Settings, *, packed: bool) -> Data:
    """Batches drawn at random and padded to their longest row, as by Trainer's default sampler and
    DataCollatorWithPadding; ``packed``: the same rows, not padded (rows of like length, as a run
    draws them, save packed tokens no time).
    """
    train = Batches(
        data.train.dataset,  # type: ignore[arg-type]
        batch_size=settings.batch_size,
        packed=packed,
        seed=settings.seed,
        bucket=1,
        pad_to_multiple=1,
    )
    return replace(data, train=train)


def time_to(curve: Curve, target: float) -> float | None:
    """Seconds at the first evaluation at or above ``target``; None if there is none."""
    return next((seconds for seconds, metric in curve if metric >= target), None)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean seconds and mean metric of every evaluation."""
    return [
        (statistics.fmean(s for s, _ in points), statistics.fmean(m for _, m in points))
        for points in zip(*curves, strict=True)
    ]


def share_of_time(found: Curve, baseline: Curve, points: float) -> float | None:
    """Time to the baseline's last metric less ``points``, as a share of the baseline's own."""
    # A mean's last digit must not decide.
    target = baseline[-1][1] - points / 100 - 1e-9
    took, of = time_to(found, target), time_to(baseline, target)
    return None if took is None or of is None else took / of


def _reached(found: Sequence[Curve], baseline: Sequence[Curve], points: float) -> dict[str, Any]:
    """Time to accuracy at one tolerance: a seed that never gets there counts as infinitely late."""
    shares = [share_of_time(f, b, points) for f, b in zip(found, baseline, strict=True)]
    median = statistics.median(math.inf if s is None else s for s in shares)
    return {
        "tolerance_points": points,
        "share_of_each_seed": shares,
        "median_share": median if math.isfinite(median) else None,
        "seeds_that_reached": sum(s is not None for s in shares),
        "share_on_mean_curve": share_of_time(mean_curve(found), mean_curve(baseline), points),
    }


def compare(found: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """Means, standard deviations over seeds, and the difference with its standard error."""
    several = len(found) > 1
    spread = [statistics.stdev(values) if several else None for values in (found, baseline)]
    error = math.sqrt(sum((s or 0.0) ** 2 for s in spread) / len(found)) if several else None
    return {
        "mean": statistics.fmean(found),
        "baseline_mean": statistics.fmean(baseline),
        "deviation": spread[0],
        "baseline_deviation": spread[1],
        "difference": statistics.fmean(found) - statistics.fmean(baseline),
        "difference_error": error,
    }


def _rows(curves: Sequence[Mapping[str, Curve]], task: str, samples: int) -> list[Row]:
    rows = []
    baseline = [of[BASELINE] for of in curves]
    for name in (n for n in PLANS if n in curves[0]):
        found = [of[name] for of in curves]
        budget = PLANS[name].settings.get("budget")
        accuracy, reference = ([100 * c[-1][1] for c in side] for side in (found, baseline))
        rows.append(
            row(
                suite="finetune",
                case=f"{task}-minilm-32",
                candidate=name,
                baseline=BASELINE,
                density=1.0 if budget is None else budget.requested,
                dtype="float32",
                direction="whole run",
                candidate_time=summarize([1e3 * curve[-1][0] for curve in found]),
                baseline_time=summarize([1e3 * curve[-1][0] for curve in baseline]),
                extra={
                    "settings": PLANS[name].to_json(),
                    "baseline_settings": {"lr": BASELINE_RATE, "epochs": 1.0},
                    "samples": samples,
                    "seeds": len(curves),
                    "accuracy": accuracy,
                    "baseline_accuracy": reference,
                    "accuracy_compared": compare(accuracy, reference),
                    "time_to_accuracy": [_reached(found, baseline, p) for p in TOLERANCES],
                    "curves": found,
                    "baseline_curves": baseline,
                },
            )
        )
    return rows


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against seconds: a colour a contestant, a pale line a seed, full their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    named = {BASELINE: rows[0]["baseline_curves"]} | {r["candidate"]: r["curves"] for r in rows}
    for i, (name, curves) in enumerate(named.items()):
        for curve in curves:
            _line(axis, curve, f"C{i}", alpha=0.3)
        _line(axis, mean_curve(curves), f"C{i}", label=name, marker=".")
    axis.set_xlabel("seconds of training, ranking included")
    axis.set_ylabel("dev accuracy, %")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _line(axis: Any, curve: Curve, color: str, **style: Any) -> None:
    seconds, metric = zip(*curve, strict=True)
    axis.plot(seconds, [100 * m for m in metric], color, **style)
