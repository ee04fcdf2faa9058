"""Build the optional stable-ABI extension beside the pure-Python package.

``SENSIKERNELS_BUILD`` chooses what is compiled:

- ``auto`` (default): CPU kernels if torch and a C++ compiler are here, CUDA kernels if nvcc is
  too. During an installation a failure leaves a package that can say what is missing.
- ``cpu`` / ``cuda``: that build or an error. ``cuda`` includes the CPU kernels.
- ``none``: pure Python.

``CXX``, ``CXXFLAGS``, ``NVCC``, ``CUDA_HOME`` and ``MAX_JOBS`` mean what they usually do.
The library is built for torch 2.10's stable ABI and for no Python version in particular.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"setuptools: expected 77 or newer, got {setuptools.__version__}; "
        "`pip install -U setuptools` when building without isolation"
    )
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

from build_native import LIBRARY, MODE, MODES, OBJECTS, BuildError, build_library  # noqa: E402

MISSING = "_native_missing.txt"


def install_file(source: Path, target: Path) -> None:
    """Copy, then rename: a process that has the old library mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, partial)
    partial.replace(target)


class BuildNative(build_ext):
    """``build_ext``: compile what changed, or leave a note that says why there is nothing."""

    built = False

    def run(self) -> None:
        installing = {"bdist_wheel", "editable_wheel"} & set(self.distribution.commands)
        strict = MODE in ("cpu", "cuda") or (MODE == "auto" and not installing)
        base = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        target, missing = (base / "sensikernels" / name for name in (LIBRARY, MISSING))
        OBJECTS.mkdir(parents=True, exist_ok=True)
        try:
            with open(OBJECTS / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = build_library(strict=strict)
                install_file(found.library, target)
            note, self.built = found.without_cuda, True
        except BuildError as error:
            if strict:
                raise SystemExit(f"sensikernels: {error}") from None
            print(f"sensikernels: installing pure Python: {error}", file=sys.stderr)
            target.unlink(missing_ok=True)
            note = str(error)
        if note is None:
            missing.unlink(missing_ok=True)
        else:
            missing.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(f"{note}\n")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "sensikernels", LIBRARY))] if self.built else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel is tagged by what was really built: ``cp310-abi3`` or ``py3-none-any``."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not self.get_finalized_command("build_ext").built:
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()


if MODE not in MODES:
    raise SystemExit(f"SENSIKERNELS_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")
setup(
    ext_modules=[Extension("sensikernels.libsensikernels", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
