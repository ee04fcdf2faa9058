"""Compile and link ``libsensikernels.so``: the compilers, torch's headers, CUDA's runtime.

``setup.py`` says when, ``build_backend.py`` what an isolated build needs for it. Nothing here
imports torch: its headers and library are found on disk, also in the environment that an isolated
build is made for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("SENSIKERNELS_BUILD", "auto")
EXTRA_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
OBJECTS = Path("build/native" + "".join(c for c in "".join(EXTRA_FLAGS) if c.isalnum() or c == "-"))
LIBRARY = "libsensikernels.so"
OLDEST_TORCH = (2, 10)
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
RUNTIME = "libcudart_static.a"


class BuildError(Exception):
    """The extension cannot be built here, and why."""


class NoNvcc(BuildError):
    """There is no nvcc: nobody expects CUDA kernels."""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """A torch on disk: its folder and version."""

    home: Path
    version: str


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """nvcc, and the folder of the runtime its objects are linked with."""

    nvcc: str
    runtime: Path

    def libraries(self) -> list[str]:
        return [f"-L{self.runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


@dataclass(frozen=True, kw_only=True)
class Built:
    """The linked library, and why it holds no CUDA kernels (None: it does)."""

    library: Path
    without_cuda: str | None


def tool(variable: str, *names: str) -> str | None:
    """The first program that exists: the one a variable names, or one of ``names``."""
    asked = os.environ.get(variable)
    return next((p for name in ([asked] if asked else names) if (p := shutil.which(name))), None)


def find_cxx() -> str:
    """The C++ compiler's path. Raises BuildError."""
    found = tool("CXX", "c++", "g++", "clang++")
    if found is None:
        asked = os.environ.get("CXX")
        raise BuildError(
            f"no C++ compiler: CXX={asked} is no program"
            if asked
            else "no C++ compiler: c++, g++ and clang++ are not on PATH"
        )
    return found


def find_torch() -> Torch:
    """The torch to compile against: an importable one, else that of the environment around.

    Raises:
        BuildError: there is none, or one older than the stable ABI in use.
    """
    homes = [Path(folder, "torch") for folder in sys.path if folder]
    homes += [Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        homes.insert(0, Path(spec.origin).parent)
    for home in homes:
        stated = home / "version.py"
        found = stated.exists() and re.search(r"__version__ = '([^']+)'", stated.read_text())
        if not found:
            continue
        version = found[1]
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
            raise BuildError(f"torch: expected 2.10 or newer to compile against, got {version}")
        return Torch(home=home, version=version)
    raise BuildError("torch was not found while building: install torch first")


def find_nvcc() -> str:
    """nvcc's path. Raises NoNvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = tool("NVCC", f"{home}/bin/nvcc", "nvcc")
    if found is None:
        asked = os.environ.get("NVCC")
        raise NoNvcc(
            f"NVCC={asked} is no program" if asked else "nvcc is neither in CUDA_HOME nor on PATH"
        )
    return found


def find_runtime(nvcc: str) -> Path:
    """The folder of CUDA's static runtime, asked of nvcc itself: it may be a wrapper script.

    Raises:
        BuildError: nvcc does not answer, or the library is in none of the places it names.
    """
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError(f"{nvcc} --dryrun: exit {done.returncode}: {said[-1] if said else '-'}")
    facts = dict(re.findall(r"^#\$ (\w+)=(.*)$", done.stderr, re.M))
    named = [word[2:] for word in shlex.split(facts.get("LIBRARIES", "")) if word[:2] == "-L"]
    homes = [facts.get("TOP", "").strip(), os.environ.get("CUDA_HOME", "")]
    inside = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    named += [f"{home}/{folder}" for home in homes if home for folder in inside]
    for folder in named:
        if Path(folder, RUNTIME).exists():
            return Path(folder).resolve()
    raise BuildError(f"{nvcc} finds no {RUNTIME} (looked in {', '.join(named) or 'no folder'})")


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


def find_cuda() -> Cuda:
    """nvcc and its runtime, before minutes are spent on compiling. Raises BuildError."""
    nvcc = find_nvcc()
    return Cuda(nvcc=nvcc, runtime=find_runtime(nvcc))


def cuda_wanted(*, strict: bool) -> Cuda | str:
    """What CUDA kernels are compiled with, or why there are to be none.

    ``strict``: an nvcc that is here but not usable is an error, too. Raises BuildError.
    """
    if MODE == "cpu":
        return "SENSIKERNELS_BUILD=cpu"
    try:
        return find_cuda()
    except BuildError as error:
        if MODE == "cuda":
            raise BuildError(f"SENSIKERNELS_BUILD=cuda, but {error}") from error
        if strict and not isinstance(error, NoNvcc):
            raise
        return str(error)


def compile_cuda(cuda: Cuda, common: list[str], key: str) -> list[Path]:
    """Objects of the CUDA kernels; ptxas's report is left in ``build/ptxas.log``."""
    report = Path("build/ptxas.log")
    report.unlink(missing_ok=True)
    command = [cuda.nvcc, *NVCC_FLAGS, *GENCODE, *common]
    objects = compile_all(Path("csrc/cuda").glob("*.cu"), command, key)
    report.write_text("".join(obj.with_suffix(".log").read_text() for obj in objects))
    return objects


def build_library(*, strict: bool) -> Built:
    """Compile and link ``build/native/libsensikernels.so`` where it is out of date.

    ``strict``: CUDA kernels that cannot be built where nvcc is are an error, too.

    Raises:
        BuildError: it cannot be built, and why.
    """
    if MODE == "none":
        raise BuildError("SENSIKERNELS_BUILD=none")
    if sys.platform != "linux":
        raise BuildError(f"the extension is built on Linux only, this is {sys.platform}")
    torch, cxx, cuda = find_torch(), find_cxx(), cuda_wanted(strict=strict)
    common = [TARGET, "-isystem", str(torch.home / "include"), "-Icsrc"]
    cpu = [cxx, *CXX_FLAGS, *EXTRA_FLAGS, *common]
    objects = compile_all(Path("csrc/cpu").glob("*.cpp"), cpu, torch.version)
    libraries = [f"-L{torch.home / 'lib'}", "-ltorch_cpu", "-Wl,--as-needed"]
    if isinstance(cuda, Cuda):
        try:
            objects += compile_cuda(cuda, common, torch.version)
            libraries += cuda.libraries()
        except BuildError as error:
            if strict:
                raise
            cuda = str(error)
    if isinstance(cuda, str) and not strict:
        print(f"sensikernels: no CUDA kernels: {cuda}", file=sys.stderr)
    archs = CUDA_ARCHS if isinstance(cuda, Cuda) else ""
    facts = [f'-DSK_TORCH_BUILD="{torch.version}"', f'-DSK_CUDA_ARCHS="{archs}"']
    objects += compile_all([Path("csrc/bindings.cpp")], [*cpu, *facts], torch.version)
    library = link_library([cxx, "-shared", *EXTRA_FLAGS], objects, libraries)
    return Built(library=library, without_cuda=cuda if isinstance(cuda, str) else None)
