"""The options that commands share, by panel; those of the methods are the methods' own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class MethodCommand(TyperCommand):
    """A command whose help lists tasks, methods and their options, read when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from sensikernels.data import TASKS
        from sensikernels.methods import METHODS, options_of

        methods = "; ".join(f"{name}: {m.summary}" for name, m in METHODS.items())
        settings = "; ".join(
            f"{name}: " + ", ".join(f"{key} ({help})" for key, (_, help) in options.items())
            for name, options in ((name, options_of(name)) for name in METHODS)
            if options
        )
        lists = {"task": ", ".join(TASKS), "method": methods, "method_option": settings}
        for option in self.params:
            if option.name in lists:
                option.help = f"{option.help} {lists[option.name]}."  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


_DATA, _BUDGET, _TRAINING, _RUN = "Task and model", "Method and budget", "Training", "Run"

Task = Annotated[
    str,
    typer.Option(
        help="The task, demo embedded:",
        rich_help_panel=_DATA,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder that holds SST-2/, MRPC/, … in GLUE's "
        "own layout; default: download from the hub.",
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
    str | None,
    typer.Option(
        "--method",
        help="How to train at a budget.",
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
        help="A setting of the method, repeatable.",
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
