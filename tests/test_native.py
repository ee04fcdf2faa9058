"""The compiled extension: loads, says what it is, and says why when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sensikernels import _native
from sensikernels.errors import SensiError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """The loader as in a new process."""
    _native.why_not.cache_clear()
    _native.available.cache_clear()
    yield monkeypatch
    _native.why_not.cache_clear()
    _native.available.cache_clear()


needs_extension = pytest.mark.skipif(
    _native.why_not() is not None, reason=f"native: {_native.why_not()}"
)


@needs_extension
def test_build_info_names_its_origin():
    info = _native.build_info()
    assert info["stable_abi"] == "2.10"
    assert info["torch"].split(".")[0] == torch.__version__.split(".")[0]
    assert set(info) == {"torch", "stable_abi", "compiler", "cuda_archs"}
    assert info["compiler"]


@needs_extension
def test_import_does_not_load_the_library():
    code = (
        "import sensikernels._native, torch;"
        "assert not hasattr(torch.ops.sensikernels_native, 'build_info');"
        "sensikernels._native.ops();"
        "assert hasattr(torch.ops.sensikernels_native, 'build_info')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_library_is_explained_and_logged_once(fresh, tmp_path: Path, caplog):
    fresh.setattr(_native, "_LIBRARY", tmp_path / "absent.so")
    note = tmp_path / "note.txt"
    note.write_text("no C++ compiler: c++ is not on PATH\nand more\n")
    fresh.setattr(_native, "_MISSING", note)
    assert not _native.available()
    assert not _native.available()
    assert len(caplog.records) == 1
    assert "no C++ compiler: c++ is not on PATH)" in caplog.text
    assert "SENSIKERNELS_BUILD=cpu" in caplog.text
    with pytest.raises(SensiError, match="native backend: no compiled extension"):
        _native.ops()


def test_unbuilt_tree_is_explained(fresh, tmp_path: Path):
    fresh.setattr(_native, "_LIBRARY", tmp_path / "absent.so")
    fresh.setattr(_native, "_MISSING", tmp_path / "absent.txt")
    assert "it was not built" in str(_native.why_not())


def test_unloadable_library_is_explained(fresh, tmp_path: Path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not an ELF file")
    fresh.setattr(_native, "_LIBRARY", broken)
    assert "broken.so does not load beside torch" in str(_native.why_not())
    with pytest.raises(SensiError):
        _native.build_info()
