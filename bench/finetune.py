"""Accuracy against time: dense HuggingFace, ours dense, ours under budgets, step by step in turn.

SST-2 (or the generated demo task without ``data_dir``), MiniLM, one epoch. A contestant's clock
counts all it does for its own sake: sensitivity, trimming, steps. Data, weights and evaluation are
left out for everybody. HuggingFace's batches are drawn in random order and padded to their longest
row. Time to accuracy: until the clock at the first evaluation that reaches HuggingFace's last
one, less ``TOLERANCE``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import summarize
from sensikernels.glue import Batches
from sensikernels.masks import Budget
from sensikernels.training import Settings
from sensikernels.training.data import Data
from sensikernels.training.loop import fresh_model, prepare, use_device
from sensikernels.training.runner import Runner, dense_runner

TOLERANCE = 0.01
BASELINE = "hf-dynamic"
EVALUATIONS = 8
PLANS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "sensi-bert-0.5": {"method": "sensi-bert", "budget": Budget(flops=0.5)},
    "bitfit": {"method": "bitfit"},
}


@dataclass(kw_only=True, eq=False)
class Racer:
    """A runner, its batches and its curve of ``(seconds, metric)``."""

    runner: Runner
    data: Data
    batches: Iterator[dict[str, Tensor]]
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What training and ranking have taken so far."""
        return sum(self.runner.step_ms) / 1e3 + self.runner.seconds["rank"]

    def evaluate(self) -> None:
        """A point of the curve."""
        metric = self.runner.evaluate(self.data)[self.data.task.main_metric]
        self.curve.append((self.seconds, metric))


def run(
    *, device: str, quick: bool, progress: Callable[[str], None], data_dir: Path | None = None,
    seeds: tuple[int, ...] | None = None, samples: int | None = None,
) -> list[Row]:  # fmt: skip
    """Rows of time to accuracy, with every seed's curve and the baseline's."""
    seeds = seeds or ((0,) if quick else (0, 1, 2))
    samples = samples or (960 if quick else 20_000)
    curves = {seed: _one_seed(seed, device, samples, data_dir, progress) for seed in seeds}
    return _rows(curves, "demo" if data_dir is None else "sst2")


def _one_seed(
    seed: int, device: str, samples: int, data_dir: Path | None, progress: Callable[[str], None]
) -> dict[str, list[tuple[float, float]]]:
    common = Settings(
        task="demo" if data_dir is None else "sst2",
        data_dir=data_dir,
        output=Path(),
        method="dense",
        max_train_samples=samples,
        seed=seed,
        device=device,
    )
    racers = {BASELINE: _hugging_face(common)}
    racers |= {name: _ours(replace(common, **given)) for name, given in PLANS.items()}
    for racer in racers.values():
        racer.runner.begin()
    steps = racers[BASELINE].runner.run.max_steps
    marks = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    order = list(racers)
    for step in range(1, steps + 1):
        # Whoever is second finds a warmer cache: take turns.
        for name in order[step % len(order) :] + order[: step % len(order)]:
            racers[name].runner.step(next(racers[name].batches))
        if step in marks:
            for racer in racers.values():
                racer.evaluate()
            state = ", ".join(f"{n} {100 * r.curve[-1][1]:.1f} % in {r.curve[-1][0]:.0f} s"
                              for n, r in racers.items())  # fmt: skip
            progress(f"seed {seed}, step {step} of {steps}: {state}")
    return {name: racer.curve for name, racer in racers.items()}


def _hugging_face(settings: Settings) -> Racer:
    data = Data.load(settings, use_device(settings))
    # As Trainer's default sampler and DataCollatorWithPadding.
    batches = Batches(
        data.train.dataset,  # type: ignore[arg-type]
        batch_size=settings.batch_size,
        seed=settings.seed,
        bucket=1,
        pad_to_multiple=1,
    )
    model = fresh_model(settings, data)
    runner = dense_runner(settings, data, model, len(batches))
    device = data.device
    moved = ({k: v.to(device) for k, v in batch.items()} for batch in batches)
    return Racer(runner=runner, data=data, batches=moved)


def _ours(settings: Settings) -> Racer:
    session = prepare(settings)
    data = session.data
    return Racer(runner=session.runner, data=data, batches=data.epoch(0))


def time_to(curve: list[tuple[float, float]], target: float) -> float | None:
    """Seconds at the first evaluation at or above ``target``; None if there is none."""
    return next((seconds for seconds, metric in curve if metric >= target), None)


def _rows(curves: dict[int, dict[str, list[tuple[float, float]]]], task: str) -> list[Row]:
    rows = []
    for name in PLANS:
        reached, ends = [], []
        for of in curves.values():
            target = of[BASELINE][-1][1] - TOLERANCE
            found = time_to(of[name], target)
            baseline = time_to(of[BASELINE], target)
            ends.append((of[BASELINE][-1][0], of[name][-1][0]))
            if found is not None and baseline is not None:
                reached.append((baseline, found))
        accuracy = [100 * of[name][-1][1] for of in curves.values()]
        dense = [100 * of[BASELINE][-1][1] for of in curves.values()]
        whole = [list(side) for side in zip(*ends, strict=True)]
        rows.append(
            row(
                suite="finetune",
                case=f"{task}-minilm-32",
                candidate=name,
                baseline=BASELINE,
                density=0.5 if name.endswith("0.5") else 1.0,
                dtype="float32",
                direction="epoch",
                candidate_time=summarize([1e3 * s for s in whole[1]]),
                baseline_time=summarize([1e3 * s for s in whole[0]]),
                extra={
                    "accuracy": accuracy,
                    "baseline_accuracy": dense,
                    "seeds": len(curves),
                    "seeds_that_reached": len(reached),
                    "time_to_accuracy_share": statistics.median(b / a for a, b in reached)
                    if reached
                    else None,
                    "tolerance_points": 100 * TOLERANCE,
                    "curves": [of[name] for of in curves.values()],
                    "baseline_curves": [of[BASELINE] for of in curves.values()],
                },
            )
        )
    return rows


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against seconds: a colour a contestant, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    named = {BASELINE: rows[0]["baseline_curves"]} | {r["candidate"]: r["curves"] for r in rows}
    for i, (name, curves) in enumerate(named.items()):
        for seed, curve in enumerate(curves):
            seconds, metric = zip(*curve, strict=True)
            label = name if seed == 0 else None
            axis.plot(seconds, [100 * m for m in metric], f"C{i}", marker=".", label=label)
    axis.set_xlabel("seconds of training, ranking included")
    axis.set_ylabel("dev accuracy, %")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
