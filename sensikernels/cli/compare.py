"""``sensikernels compare``: methods beside each other, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sensikernels._core.errors import UsageError
from sensikernels.cli import options as o
from sensikernels.cli.options import collected

EPILOG = """[bold]Examples[/bold]

sensikernels compare --task sst2 --data-dir glue --dtype bf16 --epochs 3
--methods dense,hf,sensi-bert@0.5/5,bitfit --output runs/compared

sensikernels compare --task demo --methods dense,sensi-bert@0.5,sensi-bert@0.5:ranking=random
--seeds 1 --rate-factors 1 --output runs/controls"""


def _compare(given: dict[str, Any]) -> None:
    from sensikernels.cli.show import progress_lines, show_comparison
    from sensikernels.compare import compare as run
    from sensikernels.methods import BASELINE
    from sensikernels.training import Settings

    methods, once = (
        [text.strip() for text in given.pop(name).split(",") if text.strip()]
        for name in ("methods", "once")
    )
    factors, seeds, held_out = (given.pop(n) for n in ("rate_factors", "seeds", "held_out"))
    common = Settings(**given, method=BASELINE.name)
    with progress_lines() as progress:
        content = run(
            common,
            methods,
            once=once,
            seeds=seeds,
            factors=_factors(factors),
            held_out=held_out,
            progress=progress,
        )
    show_comparison(content, common.output)


def _factors(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"rate_factors: expected numbers as in 0.5,1,2, got {text!r}") from None


@collected(_compare)
def compare(
    output: Annotated[Path, typer.Option(help="A folder; the same command goes on in it.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Contestants, separated by commas: METHOD[@SHARE of the FLOPs][/EPOCHS]"
            "[:OPTION=VALUE]…[:lr=RATE], or hf, the stock model on padded batches of like length."
        ),
    ],
    once: Annotated[
        str, typer.Option(help="More contestants, which run with the first seed alone.")
    ] = "",
    task: o.Task = "demo",
    data_dir: o.DataDir = None,
    train_file: o.TrainFile = None,
    dev_file: o.DevFile = None,
    text_column: o.TextColumn = None,
    pair_column: o.PairColumn = None,
    label_column: o.LabelColumn = None,
    doc_stride: o.DocStride = None,
    model: o.Model = "minilm",
    max_train_samples: o.MaxTrain = None,
    max_eval_samples: o.MaxEval = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Repetitions.")] = 3,
    rate_factors: Annotated[
        str,
        typer.Option(
            help="Learning rates to choose from, each method's own times these; one: no choice."
        ),
    ] = "0.5,1,2",
    held_out: Annotated[
        int, typer.Option(min=1, help="Training rows to choose learning rates by.")
    ] = 1000,
    epochs: o.Epochs = 1,
    batch_size: o.BatchSize = 32,
    ranking_rows: o.Ranking = 256,
    weight_decay: o.WeightDecay = 0.01,
    dtype: o.Dtype = "fp32",
    max_length: o.MaxLength = None,
    eval_steps: o.EvalSteps = 0,
    seed: o.Seed = 0,
    device: o.Device = "auto",
) -> None:
    """Train several methods on a task, learning rates chosen on held-out rows, and compare them."""
