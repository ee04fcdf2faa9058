"""Ours dense beside HuggingFace on words and answers: ``python -m bench.studies.tasks squad DIR``.

MiniLM, one epoch, three seeds: HuggingFace's model with torch's AdamW on padded batches, and ours
dense on the same rows in the same order, packed; with ``--flops`` a trimmed run too. SQuAD takes
the first 4,000 training and 1,500 development questions, ``ner`` all sentences. Metrics are in
points. A run that left its ``report.json`` in ``--output`` is not run again,
and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensikernels.bench.finetune import compare
from sensikernels.bench.rows import provenance, write_json
from sensikernels.masks import Budget
from sensikernels.training import Settings, finetune

QUESTIONS = {"train.json": 4000, "dev.json": 1500}
RATES = {"squad": 1e-4, "ner": 2e-4}


def first_questions(path: Path, count: int) -> dict[str, Any]:
    """The file's articles up to and with its first ``count`` questions."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    articles: list[dict[str, Any]] = []
    left = count
    for article in content["data"]:
        paragraphs: list[dict[str, Any]] = []
        for paragraph in article["paragraphs"]:
            asked = paragraph["qas"][:left]
            left -= len(asked)
            if asked:
                paragraphs.append({**paragraph, "qas": asked})
        if paragraphs:
            articles.append({**article, "paragraphs": paragraphs})
    return {**content, "data": articles}


def report_of(
    folder: Path, task: str, data_dir: Path, seed: int, flops: float | None, epochs: int
) -> dict[str, Any]:
    """The report of one run, made now unless it is there."""
    output = folder / f"{task}-{'dense' if flops is None else flops}-{seed}"
    if not (output / "report.json").exists():
        method: dict[str, Any] = {"method": "dense"}
        if flops is not None:
            method = {"method": "sensi-bert", "budget": Budget(flops=flops)}
        finetune(
            Settings(
                task=task,
                data_dir=data_dir,
                output=output,
                lr=RATES[task],
                epochs=epochs,
                seed=seed,
                compare_dense=flops is None,
                checkpoint_every=50,
                resume=output.exists(),
                predict=output.with_suffix(".json" if task == "squad" else ".conll"),
                device="cpu",
                **method,
            )
        )
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def summary(reports: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Every metric in points by contestant: every seed, and the difference from HuggingFace's."""
    points: dict[str, dict[str, list[float]]] = {}
    for (name, _), report in reports.items():
        of = {name: report["metrics"]["planned"], "hf": report["metrics"]["dense"]}
        for who, evaluations in of.items():
            for metric, value in (evaluations[-1] if evaluations else {}).items():
                points.setdefault(metric, {}).setdefault(who, []).append(100 * value)
    return {
        metric: {
            who: {"of_each_seed": values, **compare(values, of["hf"])} for who, values in of.items()
        }
        for metric, of in points.items()
    }


def main() -> int:
    """Run what is missing, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("task", choices=tuple(RATES))
    parser.add_argument("data_dir", type=Path, help="train.json and dev.json, or train.conll, …")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--flops", type=float, help="a trimmed run of this share, too")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    data_dir = given.data_dir
    if given.task == "squad":
        data_dir = given.output / "data"
        data_dir.mkdir(exist_ok=True)
        for name, count in QUESTIONS.items():
            write_json(data_dir / name, first_questions(given.data_dir / name, count))
    reports: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(given.seeds):
        for flops in (None, given.flops) if given.flops else (None,):
            name = "dense" if flops is None else f"sensi-bert-{flops}"
            arguments = (given.output, given.task, data_dir, seed, flops, given.epochs)
            reports[name, seed] = report_of(*arguments)
            print(f"seed {seed}, {name}: {reports[name, seed]['metric']}", flush=True)
    content = {
        "task": given.task,
        "epochs": given.epochs,
        "learning_rate": RATES[given.task],
        "rows": next(iter(reports.values()))["data"],
        "points": summary(reports),
    }
    print(json.dumps(content["points"], indent=1))
    if given.json:
        write_json(given.json, content)
        write_json(given.json.with_suffix(".provenance.json"), provenance("cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
