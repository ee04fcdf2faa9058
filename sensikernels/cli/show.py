"""Output of the commands: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sensikernels.hf.sensitivity import describe
from sensikernels.masks import Plan, Scores

NONE = "-"


@contextmanager
def watching(settings: Any) -> Iterator[Callable[[Any], None] | None]:
    """A bar with loss and speed on a terminal; yields what the loop calls after each step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn(f"{settings.method} on {settings.task}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("", loss=float("nan"), speed="")
        said = 0

        def watch(state: Any) -> None:
            nonlocal said
            for event in state.events[said:]:
                bar.console.print(event, highlight=False)
            said = len(state.events)
            speed = ", ".join(f"{name} {ms:.0f} ms" for name, ms in state.step_ms.items())
            bar.update(
                line, completed=state.step, total=state.max_steps, loss=state.loss, speed=speed
            )

        yield watch


def show_report(report: dict[str, Any], output: Path) -> None:
    """The run's figures as a table, and where the rest lies."""
    console = _console()
    for event in report["events"]:
        console.print(event, highlight=False)
    table = Table(title=f"{report['task_title']}, {report['method']}", title_justify="left")
    table.add_column("")
    compared = report["step_speedup"] is not None
    if compared:
        table.add_column("dense", justify="right")
    table.add_column(report["method"], justify="right")
    table.add_column("ratio", justify="right")
    for label, dense, planned, ratio in _rows(report):
        table.add_row(*((label, dense, planned, ratio) if compared else (label, planned, ratio)))
    console.print(table)
    console.print(_budget_line(report), highlight=False)
    saved = report["saved_model"]
    console.print(
        f"{output / 'model'}: {saved['class']}, {saved['parameters']:,} parameters; read back, "
        "its tensors are bit-equal to the trained model's, compacted (largest difference of logits "
        f"{saved['max_difference_reloaded']:.1g}, to those in training "
        f"{saved['max_difference_to_trained']:.1g})",
        highlight=False,
        soft_wrap=True,
    )
    names = [p.name for p in sorted(output.iterdir()) if p.is_file()]
    console.print(f"{output}: {', '.join(names)}", highlight=False, soft_wrap=True)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    flops, step, peak = (report[k] for k in ("flops_per_token", "step_ms", "peak_mib"))
    params, rate, metric = report["params"], report["tokens_per_s"], report["metric"]
    seconds = {k: (report["seconds"][k] or {}).get("to_finish") for k in ("dense", "planned")}
    yield _row("training MFLOPs per token", flops["dense"], flops["measured"], 1e-6, "{:,.2f}")
    yield _row("encoder parameters", params["dense"], params["planned"], 1, "{:,.0f}")
    yield "parameters that train", "", f"{params['trainable']:,}", ""
    yield _row("median step, ms", step["dense"], step["planned"], 1, "{:,.1f}", faster=True)
    yield _row("tokens per second", rate["dense"], rate["planned"], 1, "{:,.0f}")
    yield _row("peak memory of a step, MiB", peak["dense"], peak["planned"], 1, "{:,.0f}")
    yield _row("time to finish, s", seconds["dense"], seconds["planned"], 1, "{:,.1f}", faster=True)
    yield (
        f"dev {metric['name']}",
        _number(metric["dense_value"], 100, "{:.2f}"),
        _number(metric["value"], 100, "{:.2f}"),
        "",
    )


def _row(
    label: str,
    dense: float | None,
    planned: float | None,
    scale: float,
    form: str,
    *,
    faster: bool = False,
) -> tuple[str, str, str, str]:
    ratio = ""
    if dense and planned:
        gain = dense / planned
        speed = f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x slower"
        ratio = speed if faster else f"x{planned / dense:.3f}"
    return label, _number(dense, scale, form), _number(planned, scale, form), ratio


def _number(value: float | None, scale: float, form: str) -> str:
    return NONE if value is None else form.format(value * scale)


def _budget_line(report: dict[str, Any]) -> str:
    budget, flops = report["budget"], report["flops_per_token"]
    asked = "none" if budget["measure"] is None else f"{budget['measure']} {budget['requested']}"
    time = budget["step_time_ratio_measured"]
    timed = "" if time is None else f"; step time x{time:.3f} of the dense one"
    return (
        f"budget: asked {asked}{timed}; FLOPs planned x{budget['flops_ratio_planned']:.4f}, "
        f"measured x{budget['flops_ratio_measured']:.4f} ({flops['measured'] / 1e6:.2f} of "
        f"{flops['dense'] / 1e6:.2f} MFLOPs per token); parameters x{budget['params_ratio']:.4f} "
        f"outside the embeddings, x{budget['params_ratio_of_model']:.4f} of all"
    )


def show_plan(scores: Scores, plan: Plan) -> None:
    """The ranking of tensors, best first, and what is kept of each."""
    console = _console()
    table = Table(
        title=f"ranking by {scores.criterion} over {scores.rows} rows", title_justify="left"
    )
    for name in ("rank", "tensors", "score per FLOP", "kept", "of", "share"):
        table.add_column(name, justify="left" if name == "tensors" else "right")
    units = {c.name: c.units for c in plan.couplings}
    kept = plan.kept_counts()
    ranked = describe(scores)
    top = max((item["score_per_flop"] for item in ranked), default=0.0) or 1.0
    for place, item in enumerate(ranked, start=1):
        name = item["name"]
        table.add_row(
            str(place),
            name,
            f"{item['score_per_flop'] / top:.4f}",
            str(kept[name]),
            str(units[name]),
            f"{kept[name] / units[name]:.0%}",
        )
    console.print(table)
    console.print(str(plan).splitlines()[0], highlight=False, soft_wrap=True)


def show_rows(rows: Sequence[Any]) -> None:
    """Benchmark rows: candidate against baseline."""
    table = Table()
    for name in ("case", "candidate", "baseline", "ms", "baseline ms", "ratio", "spread"):
        table.add_column(
            name, justify="left" if name in ("case", "candidate", "baseline") else "right"
        )
    for row in rows:
        table.add_row(
            row.case,
            row.candidate,
            row.baseline,
            f"{row.candidate_ms:.3f}",
            f"{row.baseline_ms:.3f}",
            f"{row.ratio:.2f}",
            f"{row.spread:.0%}",
        )
    _console().print(table)


@contextmanager
def progress_lines() -> Iterator[Callable[[str], None]]:
    """Yields what is called with what is being timed: a status line, off a terminal a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield lambda text: status.update(str(text))


def _console() -> Console:
    """Stdout, wide enough for the tables where it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def show_comparison(content: dict[str, Any], output: Path) -> None:
    """What each contestant reaches and costs."""
    from sensikernels.compare import lines

    table = Table(
        title=f"{content['task_title']}, dev {content['metric']} in points; seconds of training, "
        "ranking included",
        title_justify="left",
    )
    table.add_column("contestant")
    for name in ("lr", content["metric"], "±", "seconds", "to dense", "FLOPs", "trained"):
        table.add_column(name, justify="right")
    for name in ("kept", "peak MiB", "ms at 1", "ms at 32"):
        table.add_column(name, justify="right")
    for line in lines(content["contestants"]):
        latency = line["latency_ms"]
        table.add_row(
            line["contestant"],
            f"{line['learning_rate']:g}",
            _number(line["mean"], 1, "{:.1f}"),
            _number(line["deviation"], 1, "{:.1f}"),
            _number(line["seconds"], 1, "{:.0f}"),
            _number(line["to_dense"], 1, "{:.2f}"),
            _number(line["flops_ratio"], 1, "x{:.2f}"),
            _number(line["parameters_trained"], 1e-6, "{:.2f}M"),
            _number(line["parameters_kept"], 1e-6, "{:.2f}M"),
            _number(line["peak_mib"], 1, "{:.0f}"),
            _number(latency.get("1"), 1, "{:.1f}"),
            _number(latency.get("32"), 1, "{:.0f}"),
        )
    _console().print(table)
    names = [p.name for p in sorted(output.iterdir()) if p.is_file()]
    _console().print(f"{output}: {', '.join(names)}", highlight=False, soft_wrap=True)
