"""Build the optional stable-ABI extension beside the pure-Python package.

``SENSIKERNELS_BUILD`` chooses what is compiled:

- ``auto`` (default): CPU kernels if torch and a C++ compiler are here, CUDA kernels if nvcc is
  too. During an installation a failure leaves a pure-Python package that can say what is missing.
- ``cpu`` / ``cuda``: that build or an error. ``cuda`` includes the CPU kernels.
- ``none``: pure Python.

``CXX``, ``CXXFLAGS``, ``NVCC``, ``CUDA_HOME`` and ``MAX_JOBS`` mean what they usually do.
The library is built for torch 2.10's stable ABI and for no Python version in particular.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
EXTRA_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
OBJECTS = Path("build/native" + "".join(c for c in "".join(EXTRA_FLAGS) if c.isalnum() or c == "-"))
LIBRARY = "libsensikernels.so"
MISSING = "_native_missing.txt"
MODE = os.environ.get("SENSIKERNELS_BUILD", "auto")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-Wno-maybe-uninitialized",  # gcc 12 warns of its own AVX-512 headers
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=2", "-Xcompiler=-fPIC", "-Xptxas=-v"]
CUDA_ARCHS = "80 90a 100"
GENCODE = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=[sm_100,compute_100]",
]


class BuildError(Exception):
    """The extension cannot be built here, and why."""


def tool(variable: str, *names: str) -> str | None:
    """The first program that exists: the one a variable names, or one of ``names``."""
    asked = os.environ.get(variable)
    return next((p for name in ([asked] if asked else names) if (p := shutil.which(name))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return tool("NVCC", f"{home}/bin/nvcc", "nvcc")


def compile_one(source: Path, command: list[str], key: str) -> Path:
    """Compile ``source`` unless its object is newer than all it includes and was made the same way.

    What the compiler says is kept in ``<object>.log``; for nvcc that is ptxas's report.
    """
    stem = OBJECTS / f"{source.parent.name}_{source.stem}"
    obj, deps, log, stamp = (stem.with_suffix(s) for s in (".o", ".d", ".log", ".key"))
    digest = hashlib.sha256(f"{key} {shlex.join(command)}".encode()).hexdigest()
    if obj.exists() and deps.exists() and stamp.exists() and stamp.read_text() == digest:
        needed = [Path(p) for p in deps.read_text().replace("\\\n", " ").split()[1:]]
        if all(p.exists() and p.stat().st_mtime <= obj.stat().st_mtime for p in needed):
            return obj
    stamp.unlink(missing_ok=True)
    print(f"compiling {source}", flush=True)
    full = [*command, "-MMD", "-MF", str(deps), "-c", str(source), "-o", str(obj)]
    done = subprocess.run(full, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{source} does not compile\n{shlex.join(full)}\n{done.stderr}")
    log.write_text(done.stderr)
    if "warning" in done.stderr:
        print(done.stderr, file=sys.stderr)
    stamp.write_text(digest)
    return obj


def compile_all(sources: Iterable[Path], command: list[str], key: str) -> list[Path]:
    workers = int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 8)))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda source: compile_one(source, command, key), sorted(sources)))


def link_library(command: list[str], objects: list[Path], libraries: list[str]) -> Path:
    library = OBJECTS / LIBRARY
    stamp = library.with_suffix(".key")
    full = [*command, *map(str, objects), *libraries, "-o", str(library)]
    if stamp.exists() and stamp.read_text() == shlex.join(full) and library.exists():
        if all(o.stat().st_mtime <= library.stat().st_mtime for o in objects):
            return library
    stamp.unlink(missing_ok=True)
    print(f"linking {library}", flush=True)
    done = subprocess.run(full, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"linking failed\n{shlex.join(full)}\n{done.stderr}")
    stamp.write_text(shlex.join(full))
    return library


def build_library(*, strict: bool) -> Path:
    """Compile and link ``build/native/libsensikernels.so`` where it is out of date; its path."""
    if MODE == "none":
        raise BuildError("SENSIKERNELS_BUILD=none")
    if sys.platform != "linux":
        raise BuildError(f"the extension is built on Linux only, this is {sys.platform}")
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            "torch was not importable while building (an isolated build does not see it): "
            "install torch, then `pip install --no-build-isolation`"
        ) from error
    cxx = tool("CXX", "c++", "g++", "clang++")
    if cxx is None:
        raise BuildError("no C++ compiler: c++, g++ and clang++ are not on PATH")
    nvcc = find_nvcc() if MODE in ("auto", "cuda") else None
    if MODE == "cuda" and nvcc is None:
        raise BuildError("SENSIKERNELS_BUILD=cuda, but nvcc is neither in CUDA_HOME nor on PATH")

    key = torch.__version__
    home = Path(torch.__file__).parent
    common = [TARGET, "-isystem", str(home / "include"), "-Icsrc"]
    cpu = [cxx, *CXX_FLAGS, *EXTRA_FLAGS, *common]
    objects = compile_all(Path("csrc/cpu").glob("*.cpp"), cpu, key)
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-Wl,--as-needed"]
    archs = ""
    report = Path("build/ptxas.log")
    report.unlink(missing_ok=True)
    if nvcc and (sources := list(Path("csrc/cuda").glob("*.cu"))):
        try:
            cuda = compile_all(sources, [nvcc, *NVCC_FLAGS, *GENCODE, *common], key)
            report.write_text("".join(obj.with_suffix(".log").read_text() for obj in cuda))
            objects += cuda
            runtime = Path(nvcc).resolve().parent.parent / "lib64"
            libraries += [f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            archs = CUDA_ARCHS
        except BuildError as error:
            if strict:
                raise
            print(f"sensikernels: building without CUDA kernels: {error}", file=sys.stderr)
    facts = [f'-DSK_TORCH_BUILD="{torch.__version__}"', f'-DSK_CUDA_ARCHS="{archs}"']
    objects += compile_all([Path("csrc/bindings.cpp")], [*cpu, *facts], key)
    return link_library([cxx, "-shared", *EXTRA_FLAGS], objects, libraries)


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
                install_file(build_library(strict=strict), target)
            missing.unlink(missing_ok=True)
            self.built = True
        except BuildError as error:
            if strict:
                raise SystemExit(f"sensikernels: {error}") from None
            print(
                f"sensikernels: installing without the native extension: {error}", file=sys.stderr
            )
            target.unlink(missing_ok=True)
            missing.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(f"{error}\n")

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


if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"SENSIKERNELS_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")
os.chdir(ROOT)
setup(
    ext_modules=[Extension("sensikernels._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
