"""A comparison as plain data, and what its table says of each contestant."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sensikernels.bench.finetune import mean_curve, time_to
from sensikernels.compare.contestant import Contestant
from sensikernels.compare.runs import Results
from sensikernels.methods import BASELINE

Curve = list[tuple[float, float]]


def to_json(
    asked: Sequence[Contestant], known: Results, latency: Mapping[str, Mapping[int, float]]
) -> dict[str, Any]:
    """Everything that was measured, by contestant; what is not known yet is left out."""
    return {
        one.text: {
            "method": one.method,
            "flops_asked": one.share,
            "grid": {f"{rate:g}": value for rate, value in known.grids.get(one.text, {}).items()},
            "learning_rate": known.rates.get(one.text),
            "latency_ms": {str(rows): ms for rows, ms in latency.get(one.text, {}).items()},
            "runs": [_run(report, one.side) for report in known.reports.get(one.text, ())],
        }
        for one in asked
    }


def _run(report: Mapping[str, Any], side: str) -> dict[str, Any]:
    """What is kept of one report; metrics are shares, seconds are those of steps and ranking."""
    ours = side == "planned"
    name, seconds = report["metric"]["name"], report["seconds"][side]
    metrics = report["metrics"][side]
    at = report["evaluated_after"][side]
    params, budget = report["params"], report["budget"]
    return {
        "seed": report["seed"],
        "metrics": metrics[-1],
        "value": report["metric"]["value" if ours else "dense_value"],
        "curve": [[s, m[name]] for s, m in zip(at, metrics, strict=True)],
        "seconds": seconds["train"] + seconds["rank"],
        "flops_ratio": budget["flops_ratio_measured"] if ours else 1.0,
        "parameters_trained": params["trainable"] if ours else None,
        "parameters_kept": params["total"] if ours else None,
        "peak_mib": report["peak_mib"][side],
        "step_ms": report["step_ms"][side],
        "steps": report["steps"]["total"],
    }


def lines(contestants: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line of the table for each contestant that has run.

    ``mean`` and ``deviation`` of the metric in points; ``to_dense``: the first evaluation of the
    mean curve that reaches the dense contestant's last mean, as a share of the dense run's seconds
    (None: never, or no dense contestant).
    """
    known = {name: one for name, one in contestants.items() if one["runs"]}
    return [_line(name, one, _dense_of(known)) for name, one in known.items()]


def _line(name: str, one: Mapping[str, Any], dense: Curve | None) -> dict[str, Any]:
    runs = one["runs"]
    points = [100 * run["value"] for run in runs]
    curve = mean_curve([run["curve"] for run in runs])
    took = None if dense is None else time_to(curve, dense[-1][1] - 1e-9)
    last = runs[-1]
    return {
        "contestant": name,
        "learning_rate": one["learning_rate"],
        "mean": statistics.fmean(points),
        "deviation": statistics.stdev(points) if len(points) > 1 else None,
        "seeds": len(points),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "to_dense": None if took is None or dense is None else took / dense[-1][0],
        **{
            key: last[key]
            for key in ("flops_ratio", "parameters_trained", "parameters_kept", "peak_mib")
        },
        "latency_ms": one["latency_ms"],
    }


def _dense_of(known: Mapping[str, Any]) -> Curve | None:
    """The mean curve of the dense contestant with the comparison's epochs, however it is tuned."""
    named = (one for name, one in known.items() if name.split(":")[0] == BASELINE.name)
    one = next(named, None)
    return None if one is None else mean_curve([run["curve"] for run in one["runs"]])
