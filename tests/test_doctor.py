"""The doctor: a usable backend says so, and an unusable one says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sensikernels._core import extension
from sensikernels.cli import doctor


def test_report_is_json_and_complete():
    facts = json.loads(json.dumps(doctor.report()))
    assert facts["libraries"]["torch"] == torch.__version__
    assert facts["backends"]["reference"] is None
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert (facts["extension"] is None) == (extension.why_not() is not None)


def test_every_backend_is_usable_or_says_why():
    for name, reason in doctor.backends().items():
        assert reason is None or len(reason) > 10, name
    assert doctor.backends()["native (CPU)"] == extension.why_not()


def test_the_table_of_families_is_the_families() -> None:
    pytest.importorskip("transformers")
    from sensikernels.hf.families import FAMILIES

    table = doctor.families()
    assert table is not None
    assert set(table) == {family.title for family in FAMILIES}
    assert table["BERT"] == {"trim": None, "fast": None}
    assert table["MPNet"] == {"trim": None, "fast": "relative positions inside attention"}


def test_triton_is_either_compiled_or_interpreted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.backends()["triton"] == "TRITON_INTERPRET=1 is set"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert doctor.backends()["triton interpreter"] == "TRITON_INTERPRET=1 is not set"


@pytest.mark.parametrize(
    ("triton", "numpy", "usable"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.6", False), ("3.9.0", "2.4.6", True)],
)
def test_interpreter_knows_its_numpy(monkeypatch, triton: str, numpy: str, usable: bool):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_version", {"triton": triton, "numpy": numpy}.get)
    assert (doctor.backends()["triton interpreter"] is None) == usable


def test_missing_triton_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in str(doctor.backends()["triton"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_reason_is_the_gpu():
    assert "CUDA" in str(doctor.backends()["triton"]) or "INTERPRET" in str(
        doctor.backends()["triton"]
    )
    assert doctor.backends()["native (CUDA)"] is not None


MADE = "(gcc 1, torch 2)"
WITHOUT = f"native, CPU kernels {MADE}; built without CUDA kernels"


@pytest.mark.parametrize(
    ("reason", "archs", "note", "line"),
    [
        (None, "80 90a", "", f"native, CPU and CUDA kernels for sm_80, sm_90a {MADE}"),
        (None, "", "no nvcc\nat all", f"{WITHOUT} (no nvcc)"),
        (None, "", None, f"{WITHOUT} (no note says why)"),
        ("it is broken", "", None, "it is broken"),
    ],
)
def test_one_line_says_which_build_this_is(
    monkeypatch, tmp_path: Path, capsys, reason: str | None, archs: str, note: str | None, line: str
):
    library, missing = tmp_path / "library.so", tmp_path / "missing.txt"
    library.write_bytes(b"")
    if note is not None:
        missing.write_text(note)
    monkeypatch.setattr(extension, "_LIBRARY", library)
    monkeypatch.setattr(extension, "_MISSING", missing)
    monkeypatch.setattr(extension, "why_not", lambda: reason)
    info = {"compiler": "gcc 1", "torch": "2", "cuda_archs": archs}
    monkeypatch.setattr(extension, "build_info", lambda: info)
    facts = doctor.report()
    assert facts["build"] == line
    doctor.show(facts)
    assert capsys.readouterr().out.splitlines()[0] == f"build: {line}"


def test_a_pure_build_says_why_it_is_one(monkeypatch, tmp_path: Path):
    missing = tmp_path / "missing.txt"
    missing.write_text("SENSIKERNELS_BUILD=none\n")
    monkeypatch.setattr(extension, "_LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(extension, "_MISSING", missing)
    extension.why_not.cache_clear()
    try:
        line = extension.describe()
    finally:
        extension.why_not.cache_clear()
    assert line.startswith("pure Python, no compiled extension (SENSIKERNELS_BUILD=none); ")
    assert "\n" not in line


def test_missing_library_is_no_version():
    assert doctor._version("a-library-that-is-not-there") is None


def test_table_shows_every_backend(capsys: pytest.CaptureFixture[str]):
    facts = doctor.report()
    facts["gpus"] = [{"name": "X1", "capability": "9.0", "memory_gib": 79.1, "multiprocessors": 1}]
    doctor.show(facts)
    out = capsys.readouterr().out
    assert all(name in out for name in doctor.backends())
    assert "X1, sm_90, 79.1 GiB" in out


def test_main_prints_this_machine(capsys: pytest.CaptureFixture[str]):
    doctor.main()
    assert torch.__version__ in capsys.readouterr().out.replace("\n", "")
