"""The CPU shim runs CUDA kernels as a GPU would, and stops at what a GPU would not forgive."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.shim import compile_shim, run_shim

HERE = Path(__file__).parent / "shim"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(HERE / "probe.cpp", tmp_path_factory.mktemp("shim"))


def test_kernels_run_under_sanitizers(probe: Path):
    assert run_shim(probe).strip().endswith("ok")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent", "deadlock: a barrier or collective that not all of its threads reach"),
        ("mask", "a warp collective whose mask leaves out the calling lane"),
        ("overflow", "heap-buffer-overflow"),
    ],
)
def test_faults_stop_the_program(probe: Path, fault: str, message: str):
    done = subprocess.run([probe, fault], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_the_same_source(tmp_path: Path):
    root = HERE.parent.parent
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-Xptxas=-v", f"-I{root / 'csrc'}"]
    command += [f"-I{root / 'tests'}", "-c", HERE / "probe.cu", "-o", tmp_path / "probe.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "row_sum" in done.stderr
