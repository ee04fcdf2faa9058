"""Is a step-time budget met? The plans ``Budget(step_time=…)`` makes, timed beside the dense step.

SST-2 (or the generated demo task without ``data_dir``), MiniLM, batches as a run draws them, one
after the other, each taken by both in turn; a first pass compiles their shapes. ``met`` is the sum
of the planned steps' times over the dense ones'; ``ratio``, as everywhere, the median speed-up. The
costs of widths are measured once a dtype and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from sensikernels._core.products import float32_products
from sensikernels.bench.contestants import Batch, Contestant
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import interleave
from sensikernels.masks import Budget
from sensikernels.training import Settings
from sensikernels.training.config import DTYPES
from sensikernels.training.loop import prepare, rank, step_costs
from sensikernels.training.runner import Runner

ASKED = (0.7, 0.5, 0.35)
ROUNDS, QUICK_ROUNDS = 64, 16
SAMPLES = 3000


def run(
    *, device: str, quick: bool, progress: Callable[[str], None], data_dir: Path | None = None
) -> list[Row]:
    """A row for every share asked, in float32 and, unless ``quick``, bfloat16."""
    rows = []
    for dtype in list(DTYPES)[: 1 if quick else None]:
        settings = Settings(
            task="demo" if data_dir is None else "sst2",
            data_dir=data_dir,
            output=Path(),
            budget=Budget(step_time=ASKED[0]),
            max_train_samples=SAMPLES,
            dtype=dtype,
            device=device,
        )
        with TemporaryDirectory() as folder, float32_products(device):
            table = Path(folder) / "costs.json"
            step_costs(settings, lambda what: progress(f"{dtype}: {what}")).save(table)  # noqa: B023
            for asked in ASKED:
                progress(f"{dtype}: {asked} of the dense step")
                asking = replace(settings, budget=Budget(step_time=asked), costs=table)
                rows.append(measure(asking, QUICK_ROUNDS if quick else ROUNDS))
    return rows


def measure(settings: Settings, rounds: int) -> Row:
    """The plan for the settings' step-time budget, ``rounds`` batches beside the dense step."""
    asked = None if settings.budget is None else settings.budget.step_time
    assert asked is not None
    dense = prepare(replace(settings, method="dense", budget=None, costs=None))
    _, plan, planned = rank(settings)
    batches = list(islice(dense.data.epoch(0), rounds))
    times = interleave(
        {
            name: _stepping(one, batches)
            for name, one in (("dense", dense.runner), ("planned", planned))
        },
        rounds=len(batches),
        warmup=len(batches),
        device=settings.device,
    )
    taken = {name: sum(timing.samples_ms) for name, timing in times.items()}
    met = plan.origin["step_time"]
    return row(
        suite="step-time",
        case=f"{settings.task}-minilm-{settings.batch_size}",
        candidate=f"step-time-{asked:g}",
        baseline="dense",
        density=asked,
        dtype=str(DTYPES[settings.dtype]).removeprefix("torch."),
        direction="step",
        candidate_time=times["planned"],
        baseline_time=times["dense"],
        extra={
            "asked": asked,
            "met": taken["planned"] / taken["dense"],
            "met_when_planned": met["met"],
            "plans_timed": met["plans"],
            "flops_ratio": plan.flops_ratio,
        },
    )


def _stepping(runner: Runner, batches: Sequence[Batch]) -> Contestant:
    assert runner.run.make_optimizer is not None
    model = runner.model.train()
    return Contestant(model=model, optimizer=runner.run.make_optimizer(model), batches=batches)
