"""The benchmark's own arithmetic: interleaving, rows, comparison."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench import compare
from sensikernels._core.errors import UsageError
from sensikernels.bench import rows, timing


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
        suite="s",
        case="c",
        candidate="x",
        baseline="y",
        candidate_time=fast,
        baseline_time=slow,
        extra={"note": 1},
    )
    assert made.ratio == 2.0
    assert made.candidate_ms == 10.0
    assert rows.to_dicts([made])[0]["note"] == 1


def test_files_carry_where_they_come_from(tmp_path: Path) -> None:
    rows.write(tmp_path / "out" / "s.json", [])
    facts = json.loads((tmp_path / "out" / "s.provenance.json").read_text())
    assert {"versions", "commit", "device", "threads"} <= set(facts)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["s.json", "s.provenance.json"]


def test_a_loss_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench" / "results" / "cpu"
    folder.mkdir(parents=True)
    base = {name: "" for name in compare.KEY} | {"suite": "s", "ratio": 2.0}
    path = folder / "s.json"
    path.write_text(json.dumps([base]))
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "bench" / "results")
    path.write_text(json.dumps([base | {"ratio": 1.95}]))
    assert compare.compare(path, "HEAD", 0.05) == (1, 0)
    path.write_text(json.dumps([base | {"ratio": 1.5}]))
    assert compare.compare(path, "HEAD", 0.05) == (1, 1)
    assert "x2.00 -> x1.50" in capsys.readouterr().out


def test_a_race_ends_when_the_process_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing._Deadline, "at", None)
    calls: list[int] = []
    timing.stop_after(-1.0)
    assert timing.time_is_up()
    times = timing.interleave({"a": lambda: calls.append(1)}, rounds=50, warmup=9)
    assert times["a"].n == 1
    assert len(calls) == 2
    timing.stop_after(None)
    assert not timing.time_is_up()


class Event:
    """A CUDA event whose clock is the count of what ran."""

    ran = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1

    def record(self) -> None:
        self.at = Event.ran

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


@pytest.mark.parametrize("host_s", [0.0, 0.003])
def test_short_calls_are_timed_by_the_device(
    host_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)

    def call() -> None:
        Event.ran += 1
        time.sleep(host_s)

    timed = timing.interleave({"a": call}, rounds=3, warmup=1, device="cuda")["a"]
    if host_s:
        assert (timed.clock, timed.l2, slept) == ("wall", "", [])
    else:
        # One call warms the cache, one is timed; the device sleeps while both are enqueued.
        assert (timed.clock, timed.l2, timed.samples_ms) == ("device", "warm", (1.0,) * 3)
        assert min(slept) >= 0.05 * timing.CYCLES_PER_MS
        made = rows.row(
            suite="s",
            case="c",
            candidate="a",
            baseline="a",
            candidate_time=timed,
            baseline_time=timed,
            extra={"gflops": 1.0},
        )
        assert made.extra == {"gflops": 1.0, "clock": "device", "l2": "warm"}


def test_each_row_is_in_the_journal_at_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    one = timing.summarize([1.0])
    rows.keep_journal(path)
    try:
        for case in ("a", "b"):
            rows.row(
                suite="s",
                case=case,
                candidate="x",
                baseline="y",
                candidate_time=one,
                baseline_time=one,
            )
            assert rows.read_journal(path)[-1]["case"] == case
    finally:
        rows.keep_journal(None)
    with open(path, "a") as journal:
        journal.write('{"cut off')
    assert len(rows.read_journal(path)) == 2


def test_a_result_has_a_journal_until_it_is_written(tmp_path: Path) -> None:
    result, beside = tmp_path / "deep" / "r.json", tmp_path / "deep" / "r.jsonl"
    one = timing.summarize([1.0])

    def measured(candidate: str, **extra: int) -> None:
        rows.row(
            suite="s",
            case="c",
            candidate=candidate,
            baseline="y",
            candidate_time=one,
            baseline_time=one,
            extra=extra,
        )

    def cut_short() -> None:
        with rows.journal(result):
            for seeds in (1, 2):
                measured("x", seeds=seeds)
                measured("z", seeds=seeds)
            measured("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    kept = [(r["candidate"], r.get("seeds")) for r in rows.read_journal(beside)]
    assert kept == [("x", 2), ("z", 2), ("x", None)]
    with rows.journal(result):
        measured("x")
    assert not beside.exists()
    assert len(rows.read_journal(tmp_path / "deep" / "r.jsonl.old")) == 3
    with rows.journal(None):
        measured("x")
    assert sorted(p.name for p in result.parent.iterdir()) == ["r.jsonl.old"]


def test_a_commit_can_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rows.COMMIT, "abc-dirty")
    assert {"commit": "abc", "dirty": True}.items() <= rows.provenance().items()
    monkeypatch.setenv(rows.COMMIT, "abc")
    assert {"commit": "abc", "dirty": False}.items() <= rows.provenance().items()


def test_time_to_accuracy_is_the_first_evaluation_that_reaches_it(tmp_path: Path) -> None:
    from sensikernels.bench import finetune

    hf = [(10.0, 0.7), (20.0, 0.9), (30.0, 0.88)]
    curve = {finetune.BASELINE: hf, "bitfit": [(2.0, 0.8), (4.0, 0.875), (6.0, 0.9)]}
    (one,) = rows.to_dicts(finetune._rows([curve], "sst2", 32))
    assert one["candidate"] == "bitfit"
    assert [t["median_share"] for t in one["time_to_accuracy"]] == [6.0 / 20.0, 4.0 / 20.0]
    assert [t["share_on_mean_curve"] for t in one["time_to_accuracy"]] == [0.3, 0.2]
    assert one["ratio"] == 30.0 / 6.0
    assert one["baseline_curves"] == [hf]
    assert finetune.time_to(hf, 0.95) is None
    finetune.draw([one], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_seed_that_never_gets_there_counts_as_late() -> None:
    from sensikernels.bench import finetune

    hf = [(10.0, 0.8), (20.0, 0.9)]
    found = [[(4.0, 0.9)], [(4.0, 0.7)], [(8.0, 0.9)]]
    curves = [{finetune.BASELINE: hf, "dense": f} for f in found]
    (exact, _) = rows.to_dicts(finetune._rows(curves, "sst2", 32))[0]["time_to_accuracy"]
    assert exact["share_of_each_seed"] == [0.2, None, 0.4]
    assert exact["median_share"] == 0.4
    assert exact["seeds_that_reached"] == 2
    assert exact["share_on_mean_curve"] is None
    assert finetune._reached(found[1:2], [hf], 0)["median_share"] is None


def test_accuracies_are_compared_by_their_spread_over_seeds() -> None:
    from sensikernels.bench.finetune import compare

    found = compare([80.0, 82.0, 84.0], [81.0, 81.0, 81.0])
    assert found["difference"] == 1.0
    assert found["deviation"] == 2.0
    assert found["difference_error"] == pytest.approx(2 / 3**0.5)
    assert compare([80.0], [79.0])["difference_error"] is None


@pytest.mark.slow
def test_a_race_goes_as_its_plans_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from sensikernels.bench import finetune

    monkeypatch.setattr(finetune, "STEPS_BETWEEN", 1)
    said: list[str] = []
    name = "sensi-bert-0.5"
    (made,) = finetune.run(device="cpu", quick=True, progress=said.append, only=name, samples=64)
    assert len(said) == len(made.extra["curves"][0]) == len(made.extra["baseline_curves"][0]) == 2
    assert made.extra["settings"]["epochs"] == finetune.PLANS[name].epochs


def test_only_known_contestants_race() -> None:
    from sensikernels.bench import finetune

    with pytest.raises(UsageError, match="only: expected one of"):
        finetune.run(device="cpu", quick=True, progress=print, only="lora")


def test_operators_are_booked_to_parts_of_the_step() -> None:
    from bench.studies.breakdown import OTHER, part_of

    named = {
        "aten::addmm": "products",
        "aten::bmm": "attention",
        "aten::bernoulli_": "dropout, norm",
        "aten::_fused_adamw_": "update",
        "sensikernels_native::bias_gelu": "GELU",
        "sensikernels::varlen_attention": "attention",
        "aten::copy_": OTHER,
        "sensikernels_native::dropout_add_norm": "dropout, norm",
    }
    assert {name: part_of(name) for name in named} == named
