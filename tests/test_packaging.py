"""The content of a wheel and an sdist: built from a copy of the tree, the wheel from the sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import sensikernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sensikernels"
TREE = (
    *("sensikernels", "csrc", "setup.py", "build_native.py", "build_backend.py"),
    *("pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE"),
)
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "_native_missing.txt", "*.egg-info")


def hook(name: str, folder: Path) -> Path:
    """Call one hook of the build backend, as pip does; the file it made."""
    code = f"import build_backend; print(build_backend.{name}('dist'))"
    environment = {**os.environ, "SENSIKERNELS_BUILD": "none", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as git has them, with a stale note of some earlier build."""
    copy = tmp_path_factory.mktemp("tree")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=NOT_SOURCE)
        else:
            shutil.copy2(source, copy / name)
    (copy / "sensikernels" / "_native_missing.txt").write_text("a stale note\n")
    (copy / "tests").mkdir()
    (copy / "tests" / "test_nothing.py").write_text("")
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return hook("build_sdist", tree)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the unpacked sdist alone."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return hook("build_wheel", next(folder.iterdir()))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def in_tree() -> dict[str, bytes]:
    """Every Python file, JSON table and marker of the package, by its name in a wheel."""
    return {
        str(path.relative_to(ROOT)): path.read_bytes()
        for pattern in ("*.py", "*.json", "py.typed")
        for path in PACKAGE.rglob(pattern)
    }


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}


def test_every_folder_with_python_files_is_a_package():
    folders = {str(Path(name).parent) for name in in_tree() if name.endswith(".py")}
    assert {"sensikernels", "sensikernels/ops", "sensikernels/bench"} < folders
    for folder in folders:
        assert f"{folder}/__init__.py" in in_tree(), folder


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    held, expected = contents(wheel), in_tree()
    note = held.pop("sensikernels/_native_missing.txt").decode()
    assert held == expected
    assert note == "SENSIKERNELS_BUILD=none\n"
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_is_free_of_tests(wheel: Path):
    for name, text in contents(wheel).items():
        assert not re.search(r"test_|pytest|conftest", name), name
        assert not re.search(rb"^\s*(import|from) (pytest|hypothesis)\b", text, re.M), name


def test_sdist_holds_what_a_build_needs_and_no_test(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert any(name.endswith(".cu") for name in native)
    assert native <= names
    assert {name for name in TREE if not (ROOT / name).is_dir()} <= names
    assert not [n for n in names if n.startswith("tests")]


def test_version_is_one_everywhere(wheel: Path, sdist: Path, metadata: Message):
    version = sensikernels.__version__
    assert metadata["Version"] == version
    assert wheel.name.startswith(f"sensikernels-{version}-")
    assert sdist.name == f"sensikernels-{version}.tar.gz"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == version


def test_metadata_is_complete(metadata: Message):
    addresses = dict(entry.split(", ") for entry in metadata.get_all("Project-URL", []))
    assert set(addresses) == {"Homepage", "Source", "Issues", "Changelog"}
    assert all(a.startswith("https://github.com/sensikernels/") for a in addresses.values())
    classifiers = metadata.get_all("Classifier", [])
    for minor in range(10, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert metadata["Author"]
    assert len(metadata["Keywords"].split(",")) >= 8
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_a_wheel_imports_outside_the_tree(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import importlib, pkgutil, sensikernels
assert sensikernels.__file__.startswith({str(tmp_path)!r})
for found in pkgutil.walk_packages(sensikernels.__path__, "sensikernels."):
    if ".triton" not in found.name and not found.name.endswith(".__main__"):
        importlib.import_module(found.name)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
