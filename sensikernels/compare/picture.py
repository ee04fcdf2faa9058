"""Metric against seconds: what each contestant reaches, and which nobody beats at both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sensikernels.bench.finetune import mean_curve


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other beats: at most their seconds, at least their metric.

    In the order of their seconds; of equal points the first is taken.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, found = float("-inf"), []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def draw(
    contestants: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], title: str, path: Path
) -> None:
    """Mean curves pale, last means with their deviation, the frontier dashed; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colors = pyplot.get_cmap("tab20")
    for place, line in enumerate(lines):
        name, color = line["contestant"], colors(place % 20)
        curve = mean_curve([run["curve"] for run in contestants[name]["runs"]])
        seconds, metric = zip(*curve, strict=True)
        axis.plot(seconds, [100 * m for m in metric], color=color, alpha=0.35)
        axis.errorbar(
            line["seconds"],
            line["mean"],
            yerr=line["deviation"],
            fmt="o",
            color=color,
            capsize=3,
            label=name,
        )
    ends = [(line["seconds"], line["mean"]) for line in lines]
    best = [ends[i] for i in frontier(ends)]
    axis.plot(*zip(*best, strict=True), color="black", linestyle="--", linewidth=0.8)
    axis.set_xlabel("seconds of training, ranking included")
    axis.set_ylabel(title)
    axis.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
