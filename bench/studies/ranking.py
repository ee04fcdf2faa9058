"""Does the ranking matter? ``python -m bench.studies.ranking --data-dir GLUE --output DIR``.

SST-2, 20,000 training rows, one epoch, MiniLM, half the FLOPs, three seeds: the ranked plan beside
dense training on the same batches, and the same budget spent on random and on reversed scores.
A run that left its ``report.json`` in ``DIR`` is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from sensikernels.bench.rows import provenance, write_json
from sensikernels.masks import Budget
from sensikernels.training import Settings, finetune

RANKINGS = ("ranked", "random", "reversed")


def report_of(folder: Path, data_dir: Path, rows: int, seed: int, ranking: str) -> dict[str, Any]:
    """The report of one run, made now unless it is there."""
    output = folder / f"{ranking}-{seed}"
    if not (output / "report.json").exists():
        finetune(
            Settings(
                task="sst2",
                data_dir=data_dir,
                output=output,
                budget=Budget(flops=0.5),
                options={} if ranking == "ranked" else {"ranking": ranking},
                max_train_samples=rows,
                lr=5e-5,
                seed=seed,
                compare_dense=ranking == "ranked",
                checkpoint_every=0,
            )
        )
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def summary(reports: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Dev accuracy in points by ranking: every seed, mean and standard deviation."""
    scores: dict[str, list[float]] = {"dense": []}
    for (ranking, _), report in reports.items():
        scores.setdefault(ranking, []).append(100 * report["metric"]["value"])
        if ranking == "ranked":
            scores["dense"].append(100 * report["metric"]["dense_value"])
    table = {
        name: {
            "accuracy": [round(v, 2) for v in values],
            "mean": round(statistics.mean(values), 2),
            "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        }
        for name, values in scores.items()
    }
    ranked = [report for (name, _), report in reports.items() if name == "ranked"]
    return {
        "accuracy": table,
        "flops_ratio_measured": [r["budget"]["flops_ratio_measured"] for r in ranked],
        "step_speedup": [round(r["step_speedup"], 2) for r in ranked],
        "settings": ranked[0]["settings"] if "settings" in ranked[0] else None,
    }


def main() -> int:
    """Run, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with SST-2/")
    parser.add_argument("--output", type=Path, required=True, help="where the runs go")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    reports = {
        (ranking, seed): report_of(given.output, given.data_dir, given.rows, seed, ranking)
        for seed in given.seeds
        for ranking in RANKINGS
    }
    made = summary(reports)
    for name, row in made["accuracy"].items():
        print(f"{name:<9} {row['mean']:6.2f}  sd {row['sd']}  {row['accuracy']}")
    if given.json:
        document = made | {"provenance": provenance()}
        if document["settings"]:
            paths = ("data_dir", "output")
            document["settings"] = {k: v for k, v in made["settings"].items() if k not in paths}
        write_json(given.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
