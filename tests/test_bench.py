"""The benchmark's own arithmetic: interleaving, rows, comparison."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sensikernels.bench import compare, rows, timing


def test_contestants_take_turns() -> None:
    seen: list[str] = []
    times = timing.interleave(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=5, warmup=1
    )
    assert [sorted(seen[i : i + 2]) for i in range(0, 12, 2)] == [["a", "b"]] * 6
    assert times["a"].n == len(times["b"].samples_ms) == 5


def test_time_runs_out_after_three_rounds() -> None:
    assert timing.interleave({"a": lambda: None}, rounds=50, budget_s=0.0)["a"].n == 3


def test_ratio_is_taken_round_by_round() -> None:
    slow, fast = timing.summarize([10.0, 30.0, 20.0]), timing.summarize([5.0, 10.0, 10.0])
    assert timing.median_ratio(slow, fast) == 2.0
    made = rows.row(
        suite="s", case="c", candidate="x", baseline="y", candidate_time=fast, baseline_time=slow,
        extra={"note": 1},
    )  # fmt: skip
    assert made.ratio == 2.0
    assert made.candidate_ms == 10.0
    assert rows.to_dicts([made])[0]["note"] == 1


def test_files_carry_where_they_come_from(tmp_path: Path) -> None:
    rows.write(tmp_path / "out" / "s.json", [])
    facts = json.loads((tmp_path / "out" / "s.provenance.json").read_text())
    assert {"versions", "commit", "device", "threads"} <= set(facts)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["s.json", "s.provenance.json"]


def test_a_loss_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    folder = tmp_path / "bench" / "results" / "cpu"
    folder.mkdir(parents=True)
    base = {name: "" for name in compare.KEY} | {"suite": "s", "ratio": 2.0}
    path = folder / "s.json"
    path.write_text(json.dumps([base]))
    for words in (["init", "-q"], ["add", "-A"],
                  ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):  # fmt: skip
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "bench" / "results")
    path.write_text(json.dumps([base | {"ratio": 1.95}]))
    assert compare.compare(path, "HEAD", 0.05) == (1, 0)
    path.write_text(json.dumps([base | {"ratio": 1.5}]))
    assert compare.compare(path, "HEAD", 0.05) == (1, 1)
    assert "x2.00 -> x1.50" in capsys.readouterr().out
