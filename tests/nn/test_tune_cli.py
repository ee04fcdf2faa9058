"""``sensikernels tune``: a table where it was asked for, one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensikernels.cli import main
from sensikernels.nn import tune as tuning
from sensikernels.ops.common import dispatch


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "USER_TABLES", tmp_path / "user")
    sizes = {"SHAPES": ((96, 64), (64, 96)), "BLOCKS": (32,), "ROUNDS": 1, "TOKENS": (4,)}
    for name, value in sizes.items():
        monkeypatch.setattr(tuning, name, value)


@pytest.mark.parametrize("given", [False, True])
def test_it_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool):
    path = tmp_path / "user" / f"{dispatch.device_key('cpu')}.json"
    path = tmp_path / "here.json" if given else path
    options = ["--output", str(path)] if given else []
    assert main(["tune", "--device", "cpu", *options]) == 0
    assert f"wrote {path}" in capsys.readouterr().out.replace("\n", "")
    assert {entry.tokens for entry in dispatch.read_table(path)} == {4}


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--device", device]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sensikernels: error: device: expected ")
    assert err.count("\n") == 1
