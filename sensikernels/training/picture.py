"""``sensitivity.png``: what the ranking found and what the plan kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sensikernels._core.errors import UsageError
from sensikernels.masks import Plan, Scores
from sensikernels.masks.structure import Coupling

TITLES = {
    "heads": "attention heads\n$W_Q\\ W_K\\ W_V\\ W_O$",
    "neurons": "FFN neurons\n$W_1\\ W_2$",
    "qk": "query/key dimensions\n$W_Q\\ W_K$",
    "vo": "value/output dimensions\n$W_V\\ W_O$",
}
COLORS = {"heads": "#3b528b", "neurons": "#5ec962", "qk": "#3b528b", "vo": "#21918c"}
INK, EMPTY, DROPPED = "#222222", "#dddddd", "#c23b22"
MANY = 64

Grid = dict[tuple[int, str], Coupling]


def draw(scores: Scores, plan: Plan, path: Path) -> None:
    """Three panels, layers from bottom to top: score of each tensor group, kept units, kept share.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "sensitivity.png: expected matplotlib installed, got none: "
            "pip install 'sensikernels[demo]'"
        ) from None
    grid: Grid = {(c.layer, c.kind): c for c in plan.couplings}
    kinds = list(dict.fromkeys(kind for _, kind in grid))
    layers = sorted({layer for layer, _ in grid})
    height = max(3.4, 0.42 * len(layers) + 1.9)
    figure = Figure(figsize=(12.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=[len(kinds), 2.6, 1.4], sharey=True)
    _scores_panel(figure, left, scores, plan, grid, kinds, layers)
    _units_panel(middle, scores, plan, grid, kinds[0], layers)
    _share_panel(right, plan, grid, kinds, layers)
    figure.suptitle(_headline(scores, plan), fontsize=12, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150, format="png")


def _headline(scores: Scores, plan: Plan) -> str:
    asked = f", asked {plan.budget.measure} {plan.budget.requested}" if plan.budget else ""
    return (
        f"{plan.method}: FLOPs x{plan.flops_ratio:.3f}, parameters x{plan.params_ratio:.3f}"
        f"{asked}   ({scores.criterion}, {scores.rows} rows)"
    )


def _scores_panel(
    figure: Any,
    axes: Any,
    scores: Scores,
    plan: Plan,
    grid: Grid,
    kinds: list[str],
    layers: list[int],
) -> None:
    per_tensor = scores.per_tensor()
    raw = np.array([[per_tensor[grid[i, k].name] for k in kinds] for i in layers])
    positive = raw[raw > 0]
    floor = positive.min() if positive.size else 1.0
    values = np.log10(np.maximum(raw, floor) / (positive.max() if positive.size else 1.0))
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis")
    middle = (values.min() + values.max()) / 2
    for y, layer in enumerate(layers):
        for x, kind in enumerate(kinds):
            coupling = grid[layer, kind]
            kept = int(plan.kept_units(coupling).sum())
            color = "white" if values[y, x] <= middle else INK
            axes.text(
                x,
                y,
                f"{kept} of {coupling.units}",
                ha="center",
                va="center",
                fontsize=9,
                color=color,
            )
    axes.set_xticks(range(len(kinds)), [TITLES[k] for k in kinds], fontsize=9)
    axes.set_yticks(range(len(layers)), [f"layer {i}" for i in layers], fontsize=9)
    axes.set_title("sensitivity per FLOP, and units kept", fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=axes, location="left", shrink=0.9, pad=0.02)
    bar.set_label("log10 of the score over the highest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    _bare(axes, len(layers), len(kinds))


def _units_panel(
    axes: Any, scores: Scores, plan: Plan, grid: Grid, kind: str, layers: list[int]
) -> None:
    """Every unit of the first kind: darker scores higher; what was dropped is crossed or red."""
    from matplotlib import colormaps

    units = max(grid[i, kind].units for i in layers)
    image = np.full((len(layers), units), np.nan)
    dropped: list[tuple[int, int]] = []
    for y, layer in enumerate(layers):
        coupling = grid[layer, kind]
        image[y, : coupling.units] = _relative(scores.values[coupling.name].double().numpy())
        kept = plan.kept_units(coupling)
        dropped += [(x, y) for x in range(coupling.units) if not kept[x]]
    colors = colormaps["Blues"].with_extremes(bad=DROPPED)
    if units > MANY:
        for x, y in dropped:
            image[y, x] = np.nan
    axes.imshow(
        image,
        aspect="auto",
        origin="lower",
        cmap=colors,
        vmin=-0.15,
        vmax=1.0,
        interpolation="nearest",
    )
    if dropped and units <= MANY:
        across, up = zip(*dropped, strict=True)
        axes.scatter(across, up, marker="x", s=34 if units <= 16 else 14, c=DROPPED, linewidths=1.3)
        axes.set_xticks(
            range(units),
            [str(i) if units <= 16 or i % 4 == 0 else "" for i in range(units)],
            fontsize=8,
        )
    sign = "red" if units > MANY else "x"
    axes.set_title(
        f"{kind}: darker scores higher in its layer, {sign} dropped", fontsize=10, color=INK
    )
    axes.set_xlabel("unit", fontsize=9)
    _bare(axes, len(layers), units if units <= MANY else 0)


def _relative(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    span = float(values.max() - values.min())
    return np.sqrt((values - values.min()) / span) if span else np.ones_like(values)


def _share_panel(axes: Any, plan: Plan, grid: Grid, kinds: list[str], layers: list[int]) -> None:
    thickness = 0.76 / len(kinds)
    for index, kind in enumerate(kinds):
        shares = []
        for layer in layers:
            coupling = grid[layer, kind]
            shares.append(float(plan.kept_units(coupling).sum()) / coupling.units)
        offset = (index - (len(kinds) - 1) / 2) * thickness
        at = [y - offset for y in range(len(layers))]
        axes.barh(at, [1.0] * len(at), thickness * 0.9, color=EMPTY, alpha=0.5)
        axes.barh(at, shares, thickness * 0.9, color=COLORS[kind], label=kind)
        for y, share in zip(at, shares, strict=True):
            axes.text(1.02, y, f"{share:.0%}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.18)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=8)
    axes.set_title("share kept", fontsize=10, color=INK)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.07),
        ncols=len(kinds),
        fontsize=8,
        frameon=False,
    )
    _bare(axes)


def _bare(axes: Any, rows: int = 0, columns: int = 0) -> None:
    """No frame and no ticks; thin white gaps between the cells of a heat map."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    for y in range(1, rows):
        axes.axhline(y - 0.5, color="white", linewidth=1.5)
    for x in range(1, columns):
        axes.axvline(x - 0.5, color="white", linewidth=1.5)
