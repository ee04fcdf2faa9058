"""The options that commands share, by panel; those of the methods are the methods' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def collected(run: Callable[[dict[str, Any]], None]) -> Callable[[Any], Any]:
    """Have a command's arguments reach ``run`` as one mapping, by name."""

    def decorate(declaration: Any) -> Any:
        @wraps(declaration)
        def command(**given: Any) -> None:
            run(given)

        return command

    return decorate


class MethodCommand(TyperCommand):
    """A command whose help lists tasks, methods and their options, read when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from sensikernels.data import FORMS, TASKS
        from sensikernels.methods import METHODS, options_of

        methods = "; ".join(f"{name}: {m.summary}" for name, m in METHODS.items())
        settings = "; ".join(
            f"{name}: " + ", ".join(f"{key} ({help})" for key, (_, help) in options.items())
            for name, options in ((name, options_of(name)) for name in METHODS)
            if options
        )
        lists = {"task": _tasks([*TASKS, *FORMS]), "method": methods, "method_option": settings}
        for option in self.params:
            if option.name in lists:
                option.help = f"{option.help} {lists[option.name]}."  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _tasks(names: Sequence[str]) -> str:
    """The tasks that a command can take; given rows are Python's."""
    return ", ".join([*(name for name in names if name != "given"), "hub:NAME"])


_task = partial(typer.Option, rich_help_panel="Task and model")
_budget = partial(typer.Option, rich_help_panel="Method and budget")
_training = partial(typer.Option, rich_help_panel="Training")
_run = partial(typer.Option, rich_help_panel="Run")

Task = Annotated[str, _task(help="The task, demo embedded:")]
DataDir = Annotated[
    Path | None,
    _task(
        help="Folder that holds SST-2/, MRPC/, … in GLUE's own layout (default: download from the "
        "hub), ner's train.conll and dev.conll, or squad's train.json and dev.json."
    ),
]
Model = Annotated[str, _task(help="minilm (embedded weights), a folder, or a hub name.")]
TrainFile = Annotated[
    Path | None, _task(help="Training rows of task file: CSV, TSV, JSON Lines or Parquet.")
]
DevFile = Annotated[Path | None, _task(help="Its development rows.")]
TextColumn = Annotated[
    str | None, _task(help="The text's column (file, hub:NAME); default: the one that can be.")
]
PairColumn = Annotated[str | None, _task(help="The second text's column.")]
LabelColumn = Annotated[
    str | None,
    _task(help="The label's column: classes, numbers to regress on, or lists of labels."),
]
DocStride = Annotated[
    int | None,
    _task(help="Tokens that neighbouring windows of a long context share (squad); default 128."),
]
Predict = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="Run",
        help="Write predictions of the development rows: .tsv or .jsonl, .conll for ner, .json for "
        "squad.",
    ),
]
MaxTrain = Annotated[int | None, _task(help="Train on this many rows, drawn by --seed.")]
MaxEval = Annotated[int | None, _task(help="Score this many development rows, always the same.")]

HeldOut = Annotated[
    int | None,
    _task(help="Score on so many training rows, held out, instead of the development rows."),
]

MethodName = Annotated[str | None, _budget("--method", help="How to train at a budget.")]
Flops = Annotated[float | None, _budget(help="Keep this share of the training step's FLOPs.")]
Params = Annotated[float | None, _budget(help="Keep this share of the encoder's parameters.")]
StepTime = Annotated[
    float | None, _budget(help="Keep this share of the dense step's time on this device.")
]
Costs = Annotated[
    Path | None,
    _budget(
        help="Measured costs of widths, for --step-time, by `sensikernels tune --costs`; default: "
        "measure them."
    ),
]
Units = Annotated[
    str | None,
    _budget(
        help="Keep these counts: heads=36,neurons=4608 (in the whole model; in each layer with "
        "--scope per_layer)."
    ),
]
Scope = Annotated[str, _budget(help="global: layers compete; per_layer: each meets it.")]
ParamsScope = Annotated[
    str,
    _budget(
        "--params-scope",
        help="What --params is a share of: encoder, the parameters outside the embeddings, or "
        "model, all of them; heads and neurons go in either case.",
    ),
]
PlanFile = Annotated[
    Path | None,
    _budget("--plan", help="Trim to this plan.json (of `sensikernels plan`) instead of ranking."),
]
Options = Annotated[
    list[str] | None,
    _budget("--method-option", metavar="KEY=VALUE", help="A setting of the method, repeatable."),
]
Ranking = Annotated[int, _budget("--ranking-rows", help="Training rows that rank the units.")]

Epochs = Annotated[float, _training(help="The last may be a part of one: 1.5.")]
BatchSize = Annotated[int, _training()]
Lr = Annotated[float | None, _training(help="Peak learning rate; default: the method's own.")]
DenseLr = Annotated[float | None, _training(help="The baseline's; default: --lr, else 5e-5.")]
Dtype = Annotated[
    str, _training(help="fp32, bf16 with fp32 master weights, or fp16: autocast and a scaled loss.")
]
RateSchedule = Annotated[
    str | None,
    _training(
        "--schedule",
        help="Course of the learning rate, by transformers' name: linear, cosine, "
        "cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt; default: "
        "the method's own.",
    ),
]
WarmupSteps = Annotated[
    int,
    _training(
        help="Steps over which the learning rate rises (those before the trim: --method-option "
        "warmup=…)."
    ),
]
WarmupRatio = Annotated[float, _training(help="The same as a share of all steps.")]
WeightDecay = Annotated[float, _training(help="Of weights, not of biases and norms.")]
MaxGradNorm = Annotated[float, _training(help="Clip gradients to this norm; 0: do not clip.")]
Accumulation = Annotated[
    int,
    _training(
        "--gradient-accumulation-steps", help="Batches whose gradients make an optimizer step."
    ),
]
Embeddings = Annotated[
    str, _training(help="Word table: sparse (only rows that occur move), frozen, or dense.")
]
Dropout = Annotated[
    str, _training(help="Masks from a counter (parallel, none stored) or torch's own.")
]
Packed = Annotated[
    bool,
    _training("--packed/--no-packed", help="Train on packed tokens, or on padded ones."),
]
Padding = Annotated[
    int,
    _training(
        "--pad-to-multiple", help="Batch lengths are multiples of this, so that shapes repeat."
    ),
]
MaxLength = Annotated[
    int | None,
    _training(
        help="Longer rows are cut, contexts of answers into windows; default 128, squad 384."
    ),
]
Seed = Annotated[int, _training()]

Device = Annotated[str, _run(help="auto, cpu or cuda.")]
Parallel = Annotated[
    str, _run(help="Under torchrun: ddp (copies of the model) or fsdp (shards of it).")
]
Compare = Annotated[
    bool,
    _run(
        "--compare-dense",
        help="Train the dense model in turn, batch by batch: the honest baseline.",
    ),
]
Resume = Annotated[bool, _run("--resume", help="Continue the run in --output.")]
EvalSteps = Annotated[int, _run(help="Evaluate every so many steps besides each epoch's end.")]
Patience = Annotated[
    int | None,
    _run(
        "--early-stopping-patience",
        help="Stop after so many evaluations without a better main metric; those before the trim "
        "do not count.",
    ),
]
Threshold = Annotated[
    float, _run("--early-stopping-threshold", help="Better means by more than this share.")
]
KeepBest = Annotated[
    bool, _run("--keep-best", help="Save the model of the best evaluation, not the last.")
]
ReportTo = Annotated[
    str, _run(help="Trackers, separated by commas: tensorboard, wandb, mlflow; below --output.")
]
Every = Annotated[int, _run(help="Steps between checkpoints; 0: none.")]
Output = Annotated[Path, _run(help="A new or empty folder.")]
