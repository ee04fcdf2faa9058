"""Compile and run programs that use ``csrc/cuda/cpu_shim.h``, under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"),
]


def compile_shim(source: Path, folder: Path, *flags: str) -> Path:
    """The program built from ``source`` in ``folder``; skips the test without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = folder / source.stem
    command = [compiler, *FLAGS, *flags, source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run_shim(program: Path, *arguments: str, stdin: bytes = b"") -> str:
    """The output of the program; a failure shows it."""
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    return done.stdout.decode()
