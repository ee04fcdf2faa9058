"""The linear suite: cases, gate, resumption, clocks, rates under their ceiling, the picture."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sensikernels.bench import linear, roofline, rows, timing
from sensikernels.bench import linear_cases as cases_of
from sensikernels.bench.linear_cases import Case
from sensikernels.nn import MaskedLinear

SMALL = Case(
    pattern="blocks",
    density=0.5,
    in_features=64,
    out_features=96,
    tokens=8,
    block=16,
    dtype=torch.float32,
    candidates=("block-sparse", "auto"),
    baselines=("dense", "hand-compacted"),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    cases = [
        replace(SMALL, pattern=pattern, direction=direction, candidates=("auto",))
        for pattern in ("rows", "columns", "blocks")
        for direction in ("forward", "forward+backward")
    ]
    cases.append(replace(SMALL, direction="grad_weight", candidates=("selective",)))
    monkeypatch.setattr(linear, "all_cases", lambda device: [c for c in cases if c.tokens == 8])
    monkeypatch.setattr(linear, "roof", lambda device, dtype: (1e6, 1e6))
    return cases


def run(**options: object) -> tuple[list[rows.Row], list[str]]:
    said: list[str] = []
    given = {"device": "cpu", "quick": False, "rounds": 3, "progress": said.append, **options}
    return linear.run(**given), said


def test_rows_have_rates_and_reasons(table: list[Case]):
    found, said = run()
    assert {one.tokens for one in found} == {8}
    assert {one.direction for one in found} == {"forward", "forward+backward", "grad_weight"}
    assert any("without hand-compacted: blocks cannot be compact" in line for line in said)
    assert any("without semi-structured: 2:4 needs CUDA" in line for line in said)
    rated = [one.extra for one in found if "gflops" in one.extra]
    assert len(rated) == len({(one.case, one.direction, one.candidate) for one in found})
    for extra in rated:
        assert extra["gflops"] == pytest.approx(extra["gb_per_s"] * extra["flop_per_byte"])
        allowed = min(1e6, 1e6 * extra["flop_per_byte"])
        assert extra["share_of_ceiling"] == pytest.approx(extra["gflops"] / allowed)


def test_flops_and_bytes_of_a_case():
    flops, moved = linear._work(replace(SMALL, pattern="rows", density=0.5))
    kept = 48 * 64
    assert flops == 3 * 2 * 8 * kept
    assert moved == 3 * 4 * (8 * (64 + 48) + kept)


def test_it_resumes_stops_and_narrows(table: list[Case]):
    first, _ = run()
    again, said = run(done=first)
    assert again == first
    assert not any("linear " in line for line in said)
    none, said = run(seconds=0.0)
    assert none == []
    assert said[-1] == "linear: stopped before case 1 of 7"
    some, _ = run(only={"pattern": ["rows"], "candidate": ["auto"], "baseline": ["dense"]})
    assert {(one.pattern, one.candidate, one.baseline) for one in some} == {
        ("rows", "auto", "dense")
    }
    with pytest.raises(ValueError, match="only: expected facts of a row or model, got colour"):
        run(only={"colour": ["red"]})


def test_what_takes_too_long_is_left_out(table: list[Case], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(linear.DENSE_SECONDS, "cpu", 1e-9)
    assert run()[0] == []


def test_a_point_ends_once_its_ratio_is_known(monkeypatch: pytest.MonkeyPatch):
    turns = iter(range(10**6))
    uneven = {"auto": lambda: None, "dense": lambda: time.sleep(1e-4 * (next(turns) % 7))}
    case = replace(SMALL, candidates=("auto",), baselines=("dense",))
    assert linear.race(uneven, case, "cpu", 35, 60.0)["auto"].n == 35
    assert linear.race(uneven, case, "cpu", 35, 0.0)["auto"].n == 3
    monkeypatch.setattr(linear, "NOISE", 1.0)
    assert linear.race(uneven, case, "cpu", 35, 60.0)["auto"].n == 5


def test_noise_is_that_of_the_median():
    steady = timing.summarize([2.0] * 9)
    assert linear.noise(steady, steady) == 0
    wild = timing.summarize([1.0, 2.0, 3.0] * 3)
    assert linear.noise(wild, timing.summarize([1.0] * 9)) == pytest.approx(1.25 * 1.48 / 2 / 3)
    assert linear.noise(timing.summarize([1.0]), timing.summarize([1.0])) == 1.0


def test_the_table_begins_with_a_sample_of_itself():
    cases = cases_of.all_cases("cpu")
    assert len({str(case.facts()) for case in cases}) == len(cases) == 9 * 5 * 20 * 3 * 2
    first = cases[: len(cases) // 12]
    models = {shape: name for name, shapes in cases_of.SHAPES.items() for shape in shapes}
    met = {(models[c.in_features, c.out_features], c.tokens, c.direction, c.dtype) for c in first}
    assert len(met) == 3 * 5 * 3 * 2
    assert {case.pattern for case in first} == set(cases_of.PATTERNS)
    assert {case.density for case in first} == set(cases_of.DENSITIES)


def test_peers_are_raced_once_a_shape():
    cases = [c for c in cases_of.all_cases("cpu") if c.direction == "forward" and c.tokens == 128]
    with_peer = {p: [c for c in cases if p in c.baselines] for p in cases_of.PEERS}
    assert [len(with_peer[p]) for p in cases_of.PEERS] == [18, 18, 9, 0]
    assert all("dense" in case.baselines for case in cases)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    right = MaskedLinear.forward
    monkeypatch.setattr(MaskedLinear, "forward", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(AssertionError, match="relative RMS error"):
        linear.measure(SMALL, "cpu", rounds=1, left=None)


def test_quick_covers_each_bar():
    cases = linear.quick_cases()
    names = {name for case in cases for name in case.candidates}
    assert names == {"compact", "block-sparse", "selective", "auto"}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    assert {"dense", "hand-compacted", "torch-bsr"} <= {b for case in cases for b in case.baselines}
    assert {1.0, 0.5, 0.25, 0.1} <= {case.density for case in cases}


def test_the_picture(table: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    found, _ = run()
    path = tmp_path / "linear.json"
    rows.write(path, found)
    picture = tmp_path / "roof.png"
    assert roofline.main([str(path), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps([]))
    assert roofline.main([str(path), "--picture", str(picture)]) == 1
    assert "rows: expected" in capsys.readouterr().err


def test_ceilings_are_measured():
    gemm, copy = roofline.roof("cpu", torch.float32)
    assert gemm > 0
    assert copy > 0
