"""The compiled extension: loads, says what it is, and says why when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sensikernels._core import extension
from sensikernels._core.errors import SensiError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """The loader as in a new process."""
    extension.why_not.cache_clear()
    extension.available.cache_clear()
    yield monkeypatch
    extension.why_not.cache_clear()
    extension.available.cache_clear()


needs_extension = pytest.mark.skipif(
    extension.why_not() is not None, reason=f"native: {extension.why_not()}"
)


@needs_extension
def test_build_info_names_its_origin():
    info = extension.build_info()
    assert info["stable_abi"] == "2.10"
    assert info["torch"].split(".")[0] == torch.__version__.split(".")[0]
    assert set(info) == {"torch", "stable_abi", "compiler", "cuda_archs"}
    assert info["compiler"]


@needs_extension
def test_import_does_not_load_the_library():
    code = (
        "import sensikernels._core.extension, torch;"
        "assert not hasattr(torch.ops.sensikernels_native, 'build_info');"
        "sensikernels._core.extension.ops();"
        "assert hasattr(torch.ops.sensikernels_native, 'build_info')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_library_is_explained_and_logged_once(fresh, tmp_path: Path, caplog):
    fresh.setattr(extension, "_LIBRARY", tmp_path / "absent.so")
    note = tmp_path / "note.txt"
    note.write_text("no C++ compiler: c++ is not on PATH\nand more\n")
    fresh.setattr(extension, "_MISSING", note)
    assert not extension.available()
    assert not extension.available()
    assert len(caplog.records) == 1
    assert "no C++ compiler: c++ is not on PATH)" in caplog.text
    assert "SENSIKERNELS_BUILD=cpu" in caplog.text
    with pytest.raises(SensiError, match="native backend: no compiled extension"):
        extension.ops()


def test_unbuilt_tree_is_explained(fresh, tmp_path: Path):
    fresh.setattr(extension, "_LIBRARY", tmp_path / "absent.so")
    fresh.setattr(extension, "_MISSING", tmp_path / "absent.txt")
    assert "it was not built" in str(extension.why_not())


def test_unloadable_library_is_explained(fresh, tmp_path: Path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not an ELF file")
    fresh.setattr(extension, "_LIBRARY", broken)
    assert "broken.so does not load beside torch" in str(extension.why_not())
    with pytest.raises(SensiError):
        extension.build_info()
