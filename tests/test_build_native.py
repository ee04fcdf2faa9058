"""Things a build looks for: torch on disk, a compiler, nvcc behind wrappers, and CUDA's runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import build_native
from build_native import RUNTIME, BuildError, NoNvcc, cuda_wanted, find_runtime, find_torch

ROOT = Path(__file__).parents[1]


def nvcc_here() -> str | None:
    """The real nvcc, whatever the tests' NVCC says."""
    for name in ("/usr/local/cuda/bin/nvcc", "/usr/local/bin/nvcc", "/usr/bin/nvcc"):
        if os.access(name, os.X_OK):
            return name
    return None


needs_nvcc = pytest.mark.skipif(nvcc_here() is None, reason="nvcc is not installed")


def script(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


def toolkit(home: Path, library: str) -> str:
    """A toolkit whose nvcc answers ``--dryrun`` as the real one does, and its runtime."""
    (home / library).mkdir(parents=True)
    (home / library / RUNTIME).write_bytes(b"")
    target = f"{home}/bin/../targets/x86_64-linux/lib"
    return script(
        home / "bin" / "nvcc",
        "cat >&2 <<'END'",
        f"#$ _HERE_={home}/bin",
        f"#$ TOP={home}/bin/..",
        f'#$ LIBRARIES=  "-L{target}/stubs" "-L{target}"',
        "END",
    )


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return monkeypatch


@pytest.mark.parametrize("library", ["lib64", "lib", "targets/x86_64-linux/lib"])
@pytest.mark.parametrize("wrapped", [0, 1, 2])
def test_runtime_is_found_behind_wrappers(no_home, tmp_path: Path, library: str, wrapped: int):
    nvcc = toolkit(tmp_path / "cuda", library)
    for depth in range(wrapped):
        nvcc = script(tmp_path / f"shims{depth}" / "nvcc", f'exec {nvcc} "$@"')
    assert find_runtime(nvcc) == (tmp_path / "cuda" / library).resolve()


def test_runtime_is_found_by_cuda_home(no_home, tmp_path: Path):
    toolkit(tmp_path / "home", "lib64")
    nvcc = script(tmp_path / "nvcc", "echo '#$ TOP=/nowhere' >&2")
    no_home.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_runtime(nvcc) == tmp_path / "home" / "lib64"


def test_no_runtime_names_where_it_looked(no_home, tmp_path: Path):
    nvcc = toolkit(tmp_path, "lib64")
    (tmp_path / "lib64" / RUNTIME).unlink()
    with pytest.raises(BuildError, match=rf"finds no {RUNTIME} \(looked in .*lib64"):
        find_runtime(nvcc)


def test_a_broken_nvcc_is_quoted(no_home, tmp_path: Path):
    nvcc = script(tmp_path / "nvcc", "echo 'no licence today' >&2", "exit 3")
    with pytest.raises(BuildError, match="--dryrun: exit 3: no licence today"):
        find_runtime(nvcc)


def test_nothing_is_compiled_without_a_runtime(no_home, tmp_path: Path):
    """A wrapper whose toolkit has no runtime ends a strict build before the first compiler runs."""
    no_home.setenv("NVCC", script(tmp_path / "nvcc", "exit 0"))
    no_home.setattr(build_native, "compile_all", lambda *_: pytest.fail("it compiled"))
    with pytest.raises(BuildError, match=f"finds no {RUNTIME}"):
        build_native.build_library(strict=True)


@pytest.mark.parametrize("mode", build_native.MODES[:3])
def test_an_absent_nvcc_is_an_error_only_where_it_was_asked_for(no_home, mode: str):
    no_home.setattr(build_native, "MODE", mode)
    no_home.setenv("NVCC", "absent")
    if mode == "cuda":
        with pytest.raises(BuildError, match="SENSIKERNELS_BUILD=cuda, but NVCC=absent"):
            cuda_wanted(strict=True)
    else:
        why = "SENSIKERNELS_BUILD=cpu" if mode == "cpu" else "NVCC=absent is no program"
        assert cuda_wanted(strict=True) == why


def test_an_unusable_nvcc_is_a_note_in_an_installation(no_home, tmp_path: Path):
    no_home.setenv("NVCC", script(tmp_path / "nvcc", "exit 0"))
    assert RUNTIME in str(cuda_wanted(strict=False))
    with pytest.raises(BuildError) as caught:
        cuda_wanted(strict=True)
    assert not isinstance(caught.value, NoNvcc)


@needs_nvcc
def test_a_wrapped_nvcc_links(no_home, tmp_path: Path):
    """The real one behind a script: an object with a kernel links with the runtime it finds."""
    nvcc = script(tmp_path / "nvcc", f'exec {nvcc_here()} "$@"')
    source = tmp_path / "one.cu"
    source.write_text('__global__ void k() {} \nextern "C" void go() { k<<<1, 1>>>(); }\n')
    obj, library = tmp_path / "one.o", tmp_path / "libone.so"
    compiled = [nvcc, "-Xcompiler=-fPIC", "-arch=sm_80", "-c", str(source), "-o", str(obj)]
    subprocess.run(compiled, check=True)
    cuda = build_native.Cuda(nvcc=nvcc, runtime=find_runtime(nvcc))
    linked = [build_native.find_cxx(), "-shared", str(obj), *cuda.libraries(), "-o", str(library)]
    done = subprocess.run([*linked, "-Wl,-z,defs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")


def isolated(code: str, tmp_path: Path, **environment: str) -> str:
    """The output of ``code`` in a process that sees setuptools alone, as in an isolated build.

    ``tmp_path/env`` is the site-packages of the environment that the build is made for.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    setup = f"""
import sys, sysconfig
sys.path[:] = [p for p in sys.path if not p.endswith("site-packages")] + [{str(tools)!r}]
sysconfig.get_path = lambda name, *rest, **more: {str(tmp_path / "env")!r}
"""
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = "import build_backend; print(build_backend.torch_needed())"


@pytest.mark.parametrize(
    ("version", "mode", "cxx", "needed"),
    [
        ("2.10.0", "auto", "true", "[]"),
        ("2.13.0+cpu", "cpu", "true", "[]"),
        ("3.0.0a0+git123", "auto", "true", "[]"),
        ("2.9.1", "auto", "true", "['torch>=2.10']"),
        (None, "auto", "true", "['torch>=2.10']"),
        (None, "cuda", "true", "['torch>=2.10']"),
        (None, "none", "true", "[]"),
        (None, "auto", "absent", "[]"),
    ],
)
def test_a_build_asks_for_torch_only_where_it_lacks_one(
    tmp_path: Path, version: str | None, mode: str, cxx: str, needed: str
):
    if version is not None:
        fake_torch(tmp_path / "env", version)
    assert isolated(ASK, tmp_path, SENSIKERNELS_BUILD=mode, CXX=cxx) == needed


def test_torch_is_the_one_that_imports():
    import torch

    found = find_torch()
    assert found.version == torch.__version__
    assert found.home == Path(torch.__file__).parent


def test_an_empty_folder_is_no_torch(tmp_path: Path):
    (tmp_path / "env" / "torch").mkdir(parents=True)
    code = """
import build_native
try:
    build_native.find_torch()
except build_native.BuildError as error:
    print(error)
"""
    said = isolated(code, tmp_path)
    assert said == "torch was not found while building: install torch first"
