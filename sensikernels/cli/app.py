"""The commands, their options, and what becomes of errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.cli import compare
from sensikernels.cli import options as o
from sensikernels.cli.options import MethodCommand, collected
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


def _finetune(given: dict[str, Any]) -> None:
    from sensikernels._core import environment
    from sensikernels.cli.show import show_report, watching
    from sensikernels.training import Settings, finetune
    from sensikernels.training.distributed import leave

    settings = _settings(Settings, given)
    first = environment.rank() == 0
    with watching(settings) if first else nullcontext() as watch:
        report = finetune(settings, watch)
    leave()
    if first:
        show_report(report, settings.output)


@app.command(
    cls=MethodCommand,
    epilog="""[bold]Examples[/bold]

sensikernels finetune --task demo --flops 0.5 --compare-dense --output runs/demo

sensikernels finetune --task sst2 --data-dir glue --model bert-base-uncased --flops 0.5
--max-train-samples 20000 --output runs/sst2

sensikernels finetune --task mrpc --data-dir glue --method bitfit --epochs 3 --output runs/bitfit

sensikernels finetune --task ner --data-dir wnut17 --flops 0.5 --output runs/ner
--predict tags.conll

sensikernels finetune --task file --train-file train.csv --dev-file dev.csv --flops 0.5
--output runs/mine

sensikernels finetune --task demo --units heads=36,neurons=4608 --method-option warmup=0.2
--output runs/units""",
)
@collected(_finetune)
def finetune(
    output: o.Output,
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
    held_out: o.HeldOut = None,
    method: o.MethodName = None,
    flops: o.Flops = None,
    params: o.Params = None,
    step_time: o.StepTime = None,
    costs: o.Costs = None,
    units: o.Units = None,
    scope: o.Scope = "global",
    params_scope: o.ParamsScope = "encoder",
    plan: o.PlanFile = None,
    method_option: o.Options = None,
    ranking_rows: o.Ranking = 256,
    epochs: o.Epochs = 1,
    batch_size: o.BatchSize = 32,
    lr: o.Lr = None,
    dense_lr: o.DenseLr = None,
    schedule: o.RateSchedule = None,
    warmup_steps: o.WarmupSteps = 0,
    warmup_ratio: o.WarmupRatio = 0.0,
    weight_decay: o.WeightDecay = 0.01,
    max_grad_norm: o.MaxGradNorm = 1.0,
    gradient_accumulation_steps: o.Accumulation = 1,
    dtype: o.Dtype = "fp32",
    embeddings: o.Embeddings = "sparse",
    dropout: o.Dropout = "counter",
    packed: o.Packed = True,
    pad_to_multiple: o.Padding = 8,
    max_length: o.MaxLength = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    parallel: o.Parallel = "ddp",
    compare_dense: o.Compare = False,
    eval_steps: o.EvalSteps = 0,
    early_stopping_patience: o.Patience = None,
    early_stopping_threshold: o.Threshold = 0.0,
    keep_best: o.KeepBest = False,
    report_to: o.ReportTo = "",
    resume: o.Resume = False,
    checkpoint_every: o.Every = 500,
    predict: o.Predict = None,
) -> None:
    """Fine-tune at a budget: warm up, rank, trim, go on, compact, save, and say what it cost."""


app.command("compare", epilog=compare.EPILOG)(compare.compare)


def _plan(given: dict[str, Any]) -> None:
    from sensikernels._core import environment
    from sensikernels._core.files import nobody, require_writable
    from sensikernels.cli.show import show_plan
    from sensikernels.training import Settings, rank
    from sensikernels.training.distributed import leave

    output = given["output"]
    settings = _settings(Settings, {**given, "output": Path()})
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


@app.command(
    "plan",
    cls=MethodCommand,
    epilog="""[bold]Example[/bold]

sensikernels plan --task demo --flops 0.5 --output plan.json

sensikernels finetune --task demo --plan plan.json --output runs/planned""",
)
@collected(_plan)
def make_plan(
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
    flops: o.Flops = None,
    params: o.Params = None,
    step_time: o.StepTime = None,
    costs: o.Costs = None,
    units: o.Units = None,
    scope: o.Scope = "global",
    params_scope: o.ParamsScope = "encoder",
    method_option: o.Options = None,
    ranking_rows: o.Ranking = 256,
    batch_size: o.BatchSize = 32,
    dtype: o.Dtype = "fp32",
    pad_to_multiple: o.Padding = 8,
    max_length: o.MaxLength = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the plan here (plan.json).")] = None,
) -> None:
    """Rank and allocate only: the ranking of tensors and what a budget keeps of them."""


@app.command()
def doctor() -> None:
    """Device, versions, usable backends, and why the others are not."""
    from sensikernels.cli import doctor as report

    report.main()


def _bench(given: dict[str, Any]) -> None:
    from sensikernels.cli.suites import run_suite

    suite, device, quick, json = (given.pop(name) for name in ("suite", "device", "quick", "json"))
    asked = {name.replace("_", "-"): value for name, value in given.items()}
    run_suite(suite, device, quick, json, asked | {"case": asked["case"] or None})


@app.command()
@collected(_bench)
def bench(
    suite: Annotated[Suite, typer.Argument(help="What to time.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, few rounds.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the rows and their provenance.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="GLUE's folders, for real batches (step, step-time, finetune)."),
    ] = None,
    squad_dir: Annotated[
        Path | None,
        typer.Option(help="A folder with SQuAD's train.json, for its windows (step only)."),
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


def _tune(given: dict[str, Any]) -> None:
    if given["costs"] is None:
        _measure_dispatch(given["device"], given["output"])
    else:
        _measure_costs(given["costs"], given)


@app.command(
    "tune",
    epilog="""[bold]Example[/bold]

sensikernels tune --device cuda

sensikernels tune --costs costs.json --task sst2 --data-dir glue --dtype bf16

sensikernels finetune --task sst2 --data-dir glue --dtype bf16 --step-time 0.5 --costs costs.json
--output runs/timed""",
)
@collected(_tune)
def tune(
    device: o.Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Default: where the runs look.")] = None,
    costs: Annotated[
        Path | None,
        typer.Option(help="Write instead what each width of a model costs, for --step-time."),
    ] = None,
    task: o.Task = "demo",
    data_dir: o.DataDir = None,
    train_file: o.TrainFile = None,
    dev_file: o.DevFile = None,
    text_column: o.TextColumn = None,
    pair_column: o.PairColumn = None,
    label_column: o.LabelColumn = None,
    doc_stride: o.DocStride = None,
    model: o.Model = "minilm",
    batch_size: o.BatchSize = 32,
    max_length: o.MaxLength = None,
    dtype: o.Dtype = "fp32",
) -> None:
    """Measure on this device from which density on dense is faster; takes a few minutes."""


def _measure_dispatch(device: str, output: Path | None) -> None:
    """``tune``: the break-even densities of this device."""
    import torch

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
    from sensikernels.methods import BASELINE
    from sensikernels.training import Settings, step_costs

    require_writable({"costs": path}, StepCosts.load)
    fields = {n: v for n, v in given.items() if n in Settings.__dataclass_fields__}
    asked = Settings(**fields | {"method": BASELINE.name, "output": Path(), "costs": None})
    with progress_lines() as progress:
        step_costs(asked, progress).save(path)
    typer.echo(f"wrote {path}")


def _settings(kind: Any, given: dict[str, Any]) -> Any:
    """The command's arguments as ``Settings``."""
    from sensikernels.masks import Budget
    from sensikernels.methods import DEFAULT
    from sensikernels.training.config import parse_counts, parse_options

    fields = {name for name in kind.__dataclass_fields__ if name in given}
    plain = {name: given[name] for name in fields}
    if "report_to" in plain:
        plain["report_to"] = tuple(filter(None, plain["report_to"].replace(" ", "").split(",")))
    counts = None if given["units"] is None else parse_counts(given["units"])
    shares = {name: given[name] for name in ("flops", "params", "step_time")} | {"units": counts}
    asked = any(value is not None for value in shares.values())
    scopes = {name: given[name] for name in ("scope", "params_scope")}
    budget = Budget(**shares, **scopes) if asked else None
    chosen = given.get("method") or DEFAULT
    options = parse_options(chosen, given["method_option"] or ())
    return kind(**plain | {"method": chosen}, budget=budget, options=options)


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
