"""The suite's output folder: rows by suite, one record of everything else, a summary, a picture."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.suite import bars
from bench.suite.outcomes import OUTCOMES
from bench.suite.outcomes import summary as summary_of_tests
from bench.suite.steps import Step
from sensikernels.bench.roofline import draw
from sensikernels.bench.rows import read_journal, write_json

RECORD, SUMMARY, PICTURE, LOGS = "suite.json", "summary.md", "roofline.png", "logs.tar.gz"
LOG_BYTES = 1 << 20
"""Of a longer log the two ends are kept."""
BAD = ("failed", "timed out")


class Report:
    """Collects what steps leave in ``work``; ``output`` is complete after every step.

    Files: ``suite.json`` (provenance, steps, ceilings, tests, fine-tuning, tables), one JSON of
    rows per suite, ``summary.md``, ``roofline.png``, ``logs.tar.gz``.
    """

    def __init__(self, *, output: Path, work: Path, device: str, quick: bool) -> None:
        self.output, self.work, self.device = output, work, device
        started = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        self.record: dict[str, Any] = {
            "kind": device,
            "quick": quick,
            "started": started,
            "steps": [],
            "results": {},
        }
        self.rows: dict[str, list[dict[str, Any]]] = {}
        output.mkdir(parents=True, exist_ok=True)
        for old in (RECORD, SUMMARY, PICTURE, LOGS, *_suites_in(output)):
            (output / old).unlink(missing_ok=True)

    def add(self, step: Step, outcome: Mapping[str, Any]) -> None:
        """Take over a step's outcome and result, and write all files anew."""
        self.record["steps"].append(self._clean(dict(outcome)))
        found = read_result(step)
        if step.suite:
            self.rows.setdefault(step.suite, []).extend(self._clean(found or []))
        elif found is not None:
            self.record["results"][step.name] = self._clean(found)
        self.write()

    def write(self) -> None:
        """Everything but the picture, each file by renaming."""
        write_json(self.output / RECORD, self.record)
        for suite, rows in self.rows.items():
            write_json(self.output / f"{suite}.json", rows)
        (self.output / SUMMARY).write_text(self.text() + "\n")
        pack_logs(self.work, self.output / LOGS)

    def finish(self) -> list[str]:
        """Draw and write; the names of the steps that went wrong."""
        if self.rows.get("linear"):
            try:
                draw(self.rows["linear"], self.output / PICTURE)
            except (ImportError, ValueError) as error:
                self.record["no_picture"] = str(error)
        self.write()
        return [s["name"] for s in self.record["steps"] if s["status"] in BAD]

    def files(self) -> list[str]:
        """The files of the report."""
        return sorted(p.name for p in self.output.iterdir() if p.is_file())

    def text(self) -> str:
        """``summary.md``."""
        return "\n".join(summary(self.record, self.rows))

    def _clean(self, value: Any) -> Any:
        """Without the paths of this machine."""
        if isinstance(value, dict):
            return {name: self._clean(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._clean(item) for item in value]
        if not isinstance(value, str):
            return value
        for folder in (self.work, ROOT):
            value = value.replace(f"{folder}/", "").replace(str(folder), ".")
        return Path(value).name if value.startswith("/") and "\n" not in value else value


def read_result(step: Step) -> Any:
    """The result that a step has written, even if only a part; None if there is none."""
    path = step.result
    if path is None:
        return None
    if step.suite:
        return read_journal(path.with_suffix(".jsonl"))
    if path.suffix == ".jsonl":
        return summary_of_tests(path)
    return json.loads(path.read_text()) if path.exists() else None


def ceilings_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measured ceilings, none if that step did not end."""
    found = record["results"].get("ceilings")
    return found if isinstance(found, list) else []


def summary(record: Mapping[str, Any], rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """The lines of ``summary.md``."""
    results = record["results"]
    facts = results.get("record", {}).get("provenance", {})
    lines = ["# Results", "", machine_line(facts), ""]
    known = bars.rates(ceilings_of(record))
    lines += ["## Bars", "", *bars.table(record["kind"], rows, known), ""]
    lines += ["## Ceilings", "", *ceiling_table(ceilings_of(record)), ""]
    lines += ["## Tests", "", *_tests(results.get("tests")), ""]
    if "finetune" in results:
        lines += ["## Fine-tuning", "", *_finetune(results["finetune"]), ""]
    lines += ["## Steps", "", "| step | | seconds | |", "|---|---|---:|---|"]
    for step in record["steps"]:
        reason = step["reason"].replace("|", "\\|").replace("\n", " ")[:160]
        lines.append(f"| {step['name']} | {step['status']} | {step['seconds']:.1f} | {reason} |")
    return lines


def machine_line(facts: Mapping[str, Any]) -> str:
    """Device, versions and commit, on one line."""
    if not facts:
        return "The machine was not recorded."
    gpu, versions = facts.get("gpu"), facts["versions"]
    name = facts["cpu"] + f", {facts['threads']} threads"
    if gpu:
        name = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    tree = {True: "with changes", False: "clean", None: "state unknown"}[facts["dirty"]]
    commit = (facts["commit"] or "unknown")[:12]
    known = ", ".join(f"{package} {number}" for package, number in versions.items() if number)
    return f"{name}; Python {facts['python']}, {known}; commit {commit}, {tree}."


def ceiling_table(ceilings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines of measured rates."""
    if not ceilings:
        return [bars.NOT_YET]
    lines = ["| ceiling | | spread |", "|---|---:|---:|"]
    return lines + [
        f"| {one['name']} | {one['value']:.4g} {one['unit']} | {one['spread']:.0%} |"
        for one in ceilings
    ]


def _tests(found: Mapping[str, Any] | None) -> list[str]:
    if not found or "passed" not in found:
        return [bars.NOT_YET]
    counts = ", ".join(f"{found[name]} {name}" for name in OUTCOMES)
    return [counts, *(f"- `{one['test']}`" for one in found["failures"][:40])]


def _finetune(report: Mapping[str, Any]) -> list[str]:
    metric, step, seconds = report["metric"], report["step_ms"], report["seconds"]
    dense = seconds["dense"] or {}
    return [
        f"{report['task_title']}, {report['method']}: {metric['name']} {metric['value']:.4f} "
        f"(dense {metric['dense_value']:.4f}), step {step['planned']:.2f} ms "
        f"(dense {step['dense']:.2f}), to finish {seconds['planned']['to_finish']:.1f} s "
        f"(dense {dense.get('to_finish', float('nan')):.1f})"
    ]


def pack_logs(work: Path, target: Path) -> None:
    """All logs of ``work`` in one archive; of a long one the ends."""
    partial = target.with_name(target.name + ".tmp")
    with tarfile.open(partial, "w:gz") as archive:
        for log in sorted(work.glob("*.log")):
            data = log.read_bytes()
            if len(data) > LOG_BYTES:
                data = data[: LOG_BYTES // 2] + b"\n[...]\n" + data[-LOG_BYTES // 2 :]
            entry = tarfile.TarInfo(log.name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    partial.replace(target)


def _suites_in(output: Path) -> list[str]:
    known = {bar.suite for bar in bars.BARS}
    return [p.name for p in output.glob("*.json") if p.stem in known]
