"""File the results of a run of the suite: ``python -m bench.suite.import_results FOLDER``.

Rows and record go to ``bench/results/<device>/``, each with its provenance; a GPU's dispatch table
to ``sensikernels/dispatch/``. Then the marked tables of README.md and ARCHITECTURE.md are written
anew from what ``bench/results`` holds; without FOLDER only that. What no JSON stands behind says
"not yet measured".
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.suite import bars
from bench.suite.report import (
    PICTURE,
    RECORD,
    ceiling_table,
    ceilings_of,
    machine_line,
)
from sensikernels.bench.rows import write_json

DOCUMENTS = ("README.md", "ARCHITECTURE.md")
SUITES = tuple(dict.fromkeys(bar.suite for bar in bars.BARS))


def bring_in(folder: Path, root: Path, *, allow_dirty: bool = False) -> list[Path]:
    """Copy one output folder into the repository at ``root``; the files written.

    Raises:
        SystemExit: it holds no results, or they are not those of a clean commit.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        facts = record["results"]["record"]["provenance"]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{folder}: expected an output folder of the suite: {error!r}") from None
    if facts["dirty"] is not False and not allow_dirty:
        state = "of a changed tree" if facts["dirty"] else "of an unknown commit"
        raise SystemExit(
            f"{folder}: expected results of a clean commit, got some {state}; "
            "--allow-dirty takes them"
        )
    target = root / "bench" / "results" / facts["device"]
    written = []
    for suite in SUITES:
        source = folder / f"{suite}.json"
        found = json.loads(source.read_text()) if source.exists() else []
        if found:
            write_json(target / f"{suite}.json", found)
            write_json(target / f"{suite}.provenance.json", facts)
            written += [target / f"{suite}.json", target / f"{suite}.provenance.json"]
    write_json(target / RECORD, merged(target / RECORD, record))
    written.append(target / RECORD)
    if (folder / PICTURE).exists():
        shutil.copyfile(folder / PICTURE, target / PICTURE)
        written.append(target / PICTURE)
    if "costs" in record["results"]:
        write_json(target / "costs.json", record["results"]["costs"])
        written.append(target / "costs.json")
    tables = record["results"].get("tune", {})
    if record["kind"] == "cuda" and "dispatch" in tables:
        path = root / "sensikernels" / "dispatch" / f"{tables['dispatch']['device']}.json"
        write_json(path, tables["dispatch"])
        written.append(path)
    return written


def merged(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` over what was filed before: a step that gave nothing now keeps its old result."""
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    return {**record, "results": before | dict(record["results"])}


def filed(results: Path) -> dict[str, dict[str, Any]]:
    """``{device: {"record": …, suite: rows}}`` of all devices the suite ran on."""
    found = {}
    for path in sorted(results.glob(f"*/{RECORD}")):
        rows = {s: path.with_name(f"{s}.json") for s in SUITES}
        found[path.parent.name] = {
            "record": json.loads(path.read_text()),
            **{s: json.loads(p.read_text()) for s, p in rows.items() if p.exists()},
        }
    return found


def gpu_bars(devices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """README's table: the bars of a GPU, for each that was measured."""
    lines: list[str] = []
    for device in _gpus(devices):
        record = device["record"]
        known = bars.rates(ceilings_of(record))
        lines += [machine_line(record["results"]["record"]["provenance"]), ""]
        lines += [*bars.table("cuda", device, known), ""]
    return lines[:-1] or bars.table("cuda", {}, {})


def gpu_ceilings(devices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """ARCHITECTURE's table: what each GPU could do at most."""
    lines: list[str] = []
    for device in _gpus(devices):
        found = ceilings_of(device["record"])
        lines += [machine_line(device["record"]["results"]["record"]["provenance"]), ""]
        lines += [*ceiling_table(found), ""]
    return lines[:-1] or [f"Ceilings of a GPU: {bars.NOT_YET}."]


def _gpus(devices: Mapping[str, Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [d for d in devices.values() if d["record"]["kind"] == "cuda"]


TABLES: Mapping[str, Callable[[Mapping[str, Mapping[str, Any]]], list[str]]] = {
    "gpu": gpu_bars,
    "ceilings": gpu_ceilings,
}


def rewrite(text: str, devices: Mapping[str, Mapping[str, Any]]) -> str:
    """``text`` with every table between ``<!-- results:NAME -->`` marks made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- results:{name} -->\n", f"<!-- /results:{name} -->"
        if start in text:
            before, rest = text.split(start, 1)
            if end not in rest:
                raise SystemExit(f"results:{name}: its end mark is missing")
            text = before + start + "\n".join(make(devices)) + "\n" + end + rest.split(end, 1)[1]
    return text


def refresh(root: Path) -> list[Path]:
    """Rewrite the marked tables below ``root``; the documents that changed."""
    devices, changed = filed(root / "bench" / "results"), []
    for name in DOCUMENTS:
        path = root / name
        old = path.read_text()
        new = rewrite(old, devices)
        if new != old:
            path.write_text(new)
            changed.append(path)
    return changed


def main() -> int:
    """File, refresh, and name what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="*")
    parser.add_argument("--allow-dirty", action="store_true", help="also of an uncommitted tree")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args()
    written = []
    for folder in given.folder:
        written += bring_in(folder, given.root, allow_dirty=given.allow_dirty)
    for path in [*written, *refresh(given.root)]:
        print(path.relative_to(given.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
