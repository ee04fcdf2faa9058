"""The dispatch table: measured, written, read, obeyed, and refused when it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensikernels._core.errors import DataError
from sensikernels.layouts import layout_of
from sensikernels.nn import tune as tuning
from sensikernels.ops.common import dispatch
from sensikernels.ops.common.dispatch import BreakEven
from sensikernels.ops.masked_linear import explain


@pytest.fixture
def user_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "USER_TABLES", tmp_path)
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


def test_tune_writes_what_auto_reads(user_tables: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"SHAPES": ((96, 64), (64, 96)), "BLOCKS": (32,), "ROUNDS": 1}.items():
        monkeypatch.setattr(tuning, name, value)
    said: list[str] = []
    path = tuning.tune("cpu", tokens=(4,), progress=said.append)
    assert path == user_tables / f"{dispatch.device_key('cpu')}.json"
    table = dispatch.read_table(path)
    assert len(table) == len(said) == 6
    assert {entry.kind for entry in table} == set(dispatch.KINDS)
    assert all(0 <= entry.density <= 1 for entry in table)


def test_auto_obeys_the_nearest_entry(user_tables: Path):
    layout = layout_of(torch.eye(4).bool(), (32, 32), (128, 128))
    entries = [
        BreakEven(kind="block-sparse", dtype="float32", block=b, tokens=t, density=d)
        for b, t, d in ((32, 1, 0.9), (32, 1024, 0.1), (128, 1024, 0.9))
    ]
    dispatch.write_table(user_tables / f"{dispatch.device_key('cpu')}.json", entries, {})
    few, many = explain(layout, tokens=2), explain(layout, tokens=900)
    assert few.form == "block-sparse"
    assert many.form == "dense"
    assert many.reason.startswith("density 0.25 > break-even 0.1 (measured on cpu")


def test_analytic_break_even_rises_with_the_block():
    gpu = torch.device("cuda")
    limits = [dispatch.analytic(gpu, "block-sparse", b, torch.bfloat16) for b in (32, 64, 128)]
    assert limits == pytest.approx([0.256, 0.427, 0.64], abs=1e-3)


def test_a_broken_table_is_refused(tmp_path: Path):
    broken = tmp_path / "x.json"
    broken.write_text('{"break_even": [{"kind": "compact"}]}')
    with pytest.raises(DataError, match="expected a dispatch table"):
        dispatch.read_table(broken)
