"""A step by operators: ``python -m bench.studies.breakdown --data-dir GLUE --picture F``.

Each contestant of one case takes a few steps under torch's profiler; every operator's own time is
booked to a part of the step. The bars are milliseconds a step, stacked.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from sensikernels._core import environment
from sensikernels._core.products import PRIMITIVES, fastest
from sensikernels.bench.contestants import Contestant, Race
from sensikernels.bench.rows import provenance, write_json
from sensikernels.bench.sentences import full_length, sentences
from sensikernels.bench.step_cases import bert_base, minilm

PARTS = {
    "update": r"adamw|_foreach|optimizer|zero_grad|linalg_vector_norm|clip",
    "dropout, norm": r"dropout|bernoulli|layer_norm|add_norm",
    "attention": r"attention|softmax|\bbmm|baddbmm|masked_fill",
    "products": r"\bmm\b|addmm|linear|matmul|mkldnn|gemm",
    "GELU": r"gelu",
    "embeddings": r"embed|index_add|sparse|coalesce",
}
"""Patterns of operator names, first match wins; what matches none is ``other``."""
OTHER = "copies, other"
CONTESTANTS = ("hf-dynamic", "dense", "bitfit", "sensi-bert-0.5")


def part_of(operator: str) -> str:
    """The part of the step an operator belongs to."""
    name = operator.lower()
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHER)


def profile(step: Contestant, steps: int, device: str) -> dict[str, float]:
    """Milliseconds a step by part, operators' own time only."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for _ in range(len(step.batches)):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profiler(activities=activities) as found:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    times = dict.fromkeys((*PARTS, OTHER), 0.0)
    for event in found.key_averages():
        own: Any = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[part_of(event.key)] += own / 1e3 / steps
    return times


def draw(tables: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One panel a case, one stacked bar a contestant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(tables), figsize=(5 * len(tables), 4), squeeze=False, layout="constrained"
    )
    for axis, (case, bars) in zip(panels[0], tables.items(), strict=True):
        bottom = [0.0] * len(bars)
        for part in (*PARTS, OTHER):
            heights = [bar[part] for bar in bars.values()]
            axis.bar(list(bars), heights, bottom=bottom, label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axis.set_title(case)
        axis.set_ylabel("ms a step")
        axis.tick_params(axis="x", labelrotation=20)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="GLUE's folders; without it the demo task")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    environment.reserve_primitive_cache(PRIMITIVES)
    torch.set_float32_matmul_precision(fastest(given.device))
    task = "demo" if given.data_dir is None else "sst2"
    cases = {
        f"{task}-minilm-32": (minilm, sentences(task, given.data_dir, 4)),
        "bert-base-8x128": (bert_base, [full_length(8, 128, 0)]),
    }
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for case, (model, rows) in cases.items():
        torch.manual_seed(0)
        base = model().to(given.device, getattr(torch, given.dtype)).train()
        race = Race(base=base, rows=rows, device=given.device)
        tables[case] = {}
        for name in CONTESTANTS:
            tables[case][name] = profile(race.make(name), given.steps, given.device)
            parts = "  ".join(f"{k} {v:.1f}" for k, v in tables[case][name].items())
            print(f"{case} {name}: {sum(tables[case][name].values()):.1f} ms  {parts}", flush=True)
    if given.json:
        write_json(
            given.json, {"dtype": given.dtype, "ms": tables, "provenance": provenance(given.device)}
        )
    if given.picture:
        given.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(tables, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
