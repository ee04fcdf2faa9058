"""The CUDA kernels, run on the CPU under sanitizers."""

from __future__ import annotations

from pathlib import Path

from tests.shim import compile_shim, run_shim


def test_cuda_kernels_follow_the_rule(tmp_path: Path) -> None:
    program = compile_shim(Path(__file__).with_name("shim_subset_adamw.cpp"), tmp_path)
    assert run_shim(program).strip() == "ok"
