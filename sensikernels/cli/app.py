"""The commands, their options, and what becomes of errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.cli.suites import Suite

app = typer.Typer(
    name="sensikernels",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Fine-tune BERT at a budget: half the FLOPs, close to half the time.",
    epilog="Start with: [bold]sensikernels finetune --task demo --model minilm --flops 0.5 "
    "--compare-dense --output runs/demo[/bold]",
)
# typer carries a click of its own in newer releases: take the class from what it exports.
_ClickError: Any = typer.BadParameter.__mro__[2]

_MOST = 1_000_000
_DATA, _BUDGET, _TRAINING, _RUN = "Task and model", "Method and budget", "Training", "Run"

Task = Annotated[
    str,
    typer.Option(
        help="demo (embedded), or a GLUE task: sst2, mrpc, stsb, "
        "qnli, qqp, mnli, mnli-mm, rte, cola, wnli.",
        rich_help_panel=_DATA,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder that holds SST-2/, MRPC/, … in GLUE's "
        "own layout; without it the hub is asked.",
        rich_help_panel=_DATA,
    ),
]
Model = Annotated[
    str,
    typer.Option(help="minilm (embedded weights), a folder, or a hub name.", rich_help_panel=_DATA),
]
MaxTrain = Annotated[
    int | None,
    typer.Option(help="Train on this many rows, drawn by --seed.", rich_help_panel=_DATA),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="dense, sensi-bert (rank and trim), "
        "bitfit (biases only), freeze (upper layers only) or dps (the most moving entries).",
        rich_help_panel=_BUDGET,
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(help="Keep this share of the training step's FLOPs.", rich_help_panel=_BUDGET),
]
Params = Annotated[
    float | None,
    typer.Option(help="Keep this share of the encoder's parameters.", rich_help_panel=_BUDGET),
]
StepTime = Annotated[
    float | None,
    typer.Option(
        help="Keep this share of the dense step's time on this device.", rich_help_panel=_BUDGET
    ),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        help="What widths cost, for --step-time, by "
        "`sensikernels tune --costs`; else measured anew.",
        rich_help_panel=_BUDGET,
    ),
]
Units = Annotated[
    str | None,
    typer.Option(
        help="Keep these counts: heads=36,neurons=4608 (in the "
        "whole model; in each layer with --scope per_layer).",
        rich_help_panel=_BUDGET,
    ),
]
Scope = Annotated[
    str,
    typer.Option(help="global: layers compete; per_layer: each meets it.", rich_help_panel=_BUDGET),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Trim to this plan.json (of `sensikernels plan`) instead of ranking.",
        rich_help_panel=_BUDGET,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--method-option",
        metavar="KEY=VALUE",
        help="A setting of the method, repeatable. sensi-bert: warmup, criterion, statistic, "
        "granularity, ranking, multiples; bitfit: subsets; freeze: share, cache; dps: masked_share, "
        "update_ratio, as_published.",
        rich_help_panel=_BUDGET,
    ),
]
Ranking = Annotated[
    int,
    typer.Option(
        "--ranking-rows", help="Training rows that rank the units.", rich_help_panel=_BUDGET
    ),
]
Epochs = Annotated[int, typer.Option(rich_help_panel=_TRAINING)]
BatchSize = Annotated[int, typer.Option(rich_help_panel=_TRAINING)]
Lr = Annotated[
    float | None,
    typer.Option(help="Peak learning rate; default: the method's own.", rich_help_panel=_TRAINING),
]
DenseLr = Annotated[
    float | None,
    typer.Option(help="The baseline's; default: --lr, else 5e-5.", rich_help_panel=_TRAINING),
]
Dtype = Annotated[
    str, typer.Option(help="fp32, or bf16 with fp32 master weights.", rich_help_panel=_TRAINING)
]
Embeddings = Annotated[
    str,
    typer.Option(
        help="Word table: sparse (only rows that occur move), frozen, or dense.",
        rich_help_panel=_TRAINING,
    ),
]
Dropout = Annotated[
    str,
    typer.Option(
        help="Masks from a counter (parallel, none stored) or torch's own.",
        rich_help_panel=_TRAINING,
    ),
]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed/--no-packed",
        help="Train on packed tokens, or on padded ones.",
        rich_help_panel=_TRAINING,
    ),
]
Padding = Annotated[
    int,
    typer.Option(
        "--pad-to-multiple",
        help="Batch lengths are multiples of this, so that shapes repeat.",
        rich_help_panel=_TRAINING,
    ),
]
MaxLength = Annotated[int, typer.Option(help="Longer rows are cut.", rich_help_panel=_TRAINING)]
Seed = Annotated[int, typer.Option(rich_help_panel=_TRAINING)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_RUN)]
Parallel = Annotated[
    str,
    typer.Option(
        help="Under torchrun: ddp (copies of the model) or fsdp (shards of it).",
        rich_help_panel=_RUN,
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare-dense",
        help="Train the dense model in turn, batch by batch: the honest baseline.",
        rich_help_panel=_RUN,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --output.", rich_help_panel=_RUN)
]
Every = Annotated[
    int, typer.Option(help="Steps between checkpoints; 0: none.", rich_help_panel=_RUN)
]
Output = Annotated[Path, typer.Option(help="A new or empty folder.", rich_help_panel=_RUN)]


@app.command(
    epilog="""[bold]Examples[/bold]

sensikernels finetune --task demo --flops 0.5 --compare-dense --output runs/demo

sensikernels finetune --task sst2 --data-dir glue --model bert-base-uncased --flops 0.5
--max-train-samples 20000 --output runs/sst2

sensikernels finetune --task mrpc --data-dir glue --method bitfit --epochs 3 --output runs/bitfit

sensikernels finetune --task demo --units heads=36,neurons=4608 --method-option warmup=0.2
--output runs/units"""
)
def finetune(
    output: Output,
    task: Task = "demo",
    data_dir: DataDir = None,
    model: Model = "minilm",
    max_train_samples: MaxTrain = None,
    method: MethodName = "sensi-bert",
    flops: Flops = None,
    params: Params = None,
    step_time: StepTime = None,
    costs: Costs = None,
    units: Units = None,
    scope: Scope = "global",
    plan: PlanFile = None,
    method_option: Options = None,
    ranking_rows: Ranking = 2048,
    epochs: Epochs = 1,
    batch_size: BatchSize = 32,
    lr: Lr = None,
    dense_lr: DenseLr = None,
    dtype: Dtype = "fp32",
    embeddings: Embeddings = "sparse",
    dropout: Dropout = "counter",
    packed: Packed = True,
    pad_to_multiple: Padding = 8,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    device: Device = "auto",
    parallel: Parallel = "ddp",
    compare_dense: Compare = False,
    resume: Resume = False,
    checkpoint_every: Every = 500,
) -> None:
    """Fine-tune at a budget: warm up, rank, trim, go on, compact, save, and say what it cost."""
    from sensikernels._core import environment
    from sensikernels.cli.show import show_report, watching
    from sensikernels.training import Settings
    from sensikernels.training import finetune as run
    from sensikernels.training.distributed import leave

    given = dict(locals())
    settings = _settings(Settings, given)
    first = environment.rank() == 0
    with watching(settings) if first else nullcontext() as watch:
        report = run(settings, watch)
    leave()
    if first:
        show_report(report, settings.output)


@app.command(
    "plan",
    epilog="""[bold]Example[/bold]

sensikernels plan --task demo --flops 0.5 --output plan.json

sensikernels finetune --task demo --plan plan.json --output runs/planned""",
)
def make_plan(
    task: Task = "demo",
    data_dir: DataDir = None,
    model: Model = "minilm",
    max_train_samples: MaxTrain = None,
    flops: Flops = None,
    params: Params = None,
    step_time: StepTime = None,
    costs: Costs = None,
    units: Units = None,
    scope: Scope = "global",
    method_option: Options = None,
    ranking_rows: Ranking = 2048,
    batch_size: BatchSize = 32,
    dtype: Dtype = "fp32",
    pad_to_multiple: Padding = 8,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the plan here (plan.json).")] = None,
) -> None:
    """Rank and allocate only: the ranking of tensors and what a budget keeps of them."""
    from sensikernels._core import environment
    from sensikernels._core.files import nobody, require_writable
    from sensikernels.cli.show import show_plan
    from sensikernels.training import Settings, rank
    from sensikernels.training.distributed import leave

    given = {**locals(), "method": "sensi-bert", "output": Path()}
    settings = _settings(Settings, given)
    if output is not None and environment.rank() == 0:
        grids = output.with_suffix(".safetensors")
        require_writable({"output": output, "output's grids": grids}, nobody)
    scores, chosen, _ = rank(settings)
    leave()
    if environment.rank() > 0:
        return
    show_plan(scores, chosen)
    if output is not None:
        chosen.save(output)


@app.command()
def doctor() -> None:
    """Device, versions, usable backends, and why the others are not."""
    from sensikernels.cli import doctor as report

    report.main()


@app.command()
def bench(
    suite: Annotated[Suite, typer.Argument(help="What to time.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, few rounds.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the rows and their provenance.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="GLUE's folders, for real batches (step, latency, finetune)."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Rounds of each case (linear only).")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="A case by name, in full; repeatable (step only)."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Contestants, separated by commas (step, finetune).")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Repetitions (finetune only).")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Training rows (finetune only).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Start no case later (linear only).")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw as PNG the roofline (linear), accuracy against time (finetune)."),
    ] = None,
) -> None:
    """Time one part of the library against its baselines, interleaved."""
    from sensikernels.cli.suites import run_suite

    given = {
        "data-dir": data_dir,
        "case": case or None,
        "rounds": rounds,
        "only": only,
        "seeds": seeds,
        "samples": samples,
        "seconds": seconds,
        "picture": picture,
    }
    run_suite(suite, device, quick, json, given)


@app.command(
    "tune",
    epilog="""[bold]Example[/bold]

sensikernels tune --device cuda

sensikernels tune --costs costs.json --task sst2 --data-dir glue --dtype bf16

sensikernels finetune --task sst2 --data-dir glue --dtype bf16 --step-time 0.5 --costs costs.json
--output runs/timed""",
)
def measure_dispatch(
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Default: where the runs look.")] = None,
    costs: Annotated[
        Path | None,
        typer.Option(help="Write instead what each width of a model costs, for --step-time."),
    ] = None,
    task: Task = "demo",
    data_dir: DataDir = None,
    model: Model = "minilm",
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    dtype: Dtype = "fp32",
) -> None:
    """Measure on this device from which density on dense is faster; takes a few minutes."""
    import torch

    if costs is not None:
        _measure_costs(costs, dict(locals()))
        return
    from sensikernels._core.files import require_writable
    from sensikernels.cli.show import progress_lines
    from sensikernels.nn.tune import tune
    from sensikernels.ops.common.dispatch import read_table

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu or cuda, got {device}")
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UsageError("device: expected one this machine has, got cuda")
    if output is not None:
        require_writable({"output": output}, read_table)
    with progress_lines() as progress:
        written = tune("cuda" if found and device != "cpu" else "cpu", output, progress=progress)
    typer.echo(f"wrote {written}")


def _measure_costs(path: Path, given: dict[str, Any]) -> None:
    """``tune --costs``: a table for runs of these settings."""
    from sensikernels._core.files import require_writable
    from sensikernels.cli.show import progress_lines
    from sensikernels.masks import StepCosts
    from sensikernels.training import Settings, step_costs

    require_writable({"costs": path}, StepCosts.load)
    names = ("task", "data_dir", "model", "batch_size", "max_length", "dtype", "device")
    asked = Settings(method="dense", output=Path(), **{name: given[name] for name in names})
    with progress_lines() as progress:
        step_costs(asked, progress).save(path)
    typer.echo(f"wrote {path}")


def _settings(kind: Any, given: dict[str, Any]) -> Any:
    """The command's arguments as ``Settings``."""
    from sensikernels.masks import Budget
    from sensikernels.training.config import parse_counts, parse_options

    fields = {name for name in kind.__dataclass_fields__ if name in given}
    plain = {name: given[name] for name in fields}
    counts = None if given["units"] is None else parse_counts(given["units"])
    shares = {name: given[name] for name in ("flops", "params", "step_time")} | {"units": counts}
    asked = any(value is not None for value in shares.values())
    budget = Budget(**shares, scope=given["scope"]) if asked else None
    options = parse_options(given["method"], given["method_option"] or ())
    return kind(**plain, budget=budget, options=options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (data, checkpoint, disk) or 2 (usage)."""
    from sensikernels._core import environment

    try:
        logging.basicConfig(level=environment.log_level(), format="%(levelname)s %(message)s")
        command = typer.main.get_command(app)
        given = None if arguments is None else list(arguments)
        code = command.main(args=given, prog_name="sensikernels", standalone_mode=False)
        return int(code or 0)
    except _ClickError as error:
        # Without arguments the help has been printed, and there is nothing more to say.
        return _fail(error.format_message(), 2) if error.format_message() else 2
    except SensiError as error:
        return _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except ImportError as error:
        return _fail(f"{error}: pip install 'sensikernels[hf,glue]'", 1)


def _fail(message: str, code: int) -> int:
    typer.echo(f"sensikernels: error: {' '.join(message.split())}", err=True)
    return code
