"""The linear suite: cases, gate, resumption, clocks, rates under their ceiling, the picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sensikernels.bench import linear, roofline, rows
from sensikernels.bench.linear import Case

SMALL = Case(
    pattern="blocks", density=0.5, in_features=64, out_features=96, tokens=8, block=16,
    dtype=torch.float32, candidates=("block-sparse", "auto"), baselines=("dense", "hand-packed"),
)  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    cases = [
        replace(SMALL, pattern=pattern, direction=direction, candidates=("auto",))
        for pattern in ("rows", "columns", "blocks")
        for direction in ("forward", "forward+backward")
    ]
    cases.append(replace(SMALL, direction="grad_weight", candidates=("selective",)))
    cases.append(replace(SMALL, tokens=16384, candidates=("auto",)))
    monkeypatch.setattr(linear, "all_cases", lambda device: cases)
    monkeypatch.setattr(linear, "CPU_TOKENS", (8,))
    monkeypatch.setattr(linear, "roof", lambda device, dtype: (1e6, 1e6))
    return cases


def run(**options: object) -> tuple[list[rows.Row], list[str]]:
    said: list[str] = []
    given = {"device": "cpu", "quick": False, "rounds": 1, "progress": said.append, **options}
    return linear.run(**given), said


def test_rows_have_rates_and_reasons(table: list[Case]):
    found, said = run()
    assert {one.tokens for one in found} == {8}
    assert {one.direction for one in found} == {"forward", "forward+backward", "grad_weight"}
    assert any("without hand-packed: blocks cannot be packed" in line for line in said)
    for one in found:
        extra = one.extra
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
    assert said == []
    none, said = run(seconds=0.0)
    assert none == []
    assert said == ["linear: stopped before case 1 of 7"]
    wide, _ = run(tokens=(16384,))
    assert {one.tokens for one in wide} == {16384}


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    right = linear.masked_linear
    monkeypatch.setattr(linear, "masked_linear", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(AssertionError, match="relative RMS error"):
        linear.measure(SMALL, "cpu", rounds=1, left=None)


def test_quick_covers_each_bar():
    cases = linear.quick_cases()
    names = {name for case in cases for name in case.candidates}
    assert names == {"packed", "block-sparse", "selective", "auto"}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    assert {"dense", "hand-packed", "torch-bsr"} <= {b for case in cases for b in case.baselines}
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
