"""The cost, needs and names of ``import sensikernels``."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sensikernels

ROOT = Path(__file__).parents[1]
OPTIONAL = ("triton", "transformers", "datasets", "sklearn", "scipy", "matplotlib", "rich", "typer")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_nothing_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import sensikernels;"
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('sensikernels')))"
    )
    extra = {name.split(".")[0] for name in run(code).split()}
    assert not extra & {*OPTIONAL, "numpy"}


def test_import_takes_no_time():
    code = (
        "import time, torch; start = time.process_time(); import sensikernels;"
        "print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(2)) < 0.1


def test_works_without_the_optional_libraries():
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
import torch
from sensikernels import Budget, Mask, MaskedLinear, Plan, SelectiveLinear, SubsetAdamW, select_kept
linear = torch.nn.Linear(8, 6)
mask = Mask.rows(torch.arange(6) < 3, (6, 8))
layer = MaskedLinear.from_linear(linear, mask)
layer(torch.ones(2, 8)).sum().backward()
"""
    run(code)


def test_every_public_name_resolves():
    for name in sensikernels.__all__:
        assert getattr(sensikernels, name) is not None
    assert sorted(sensikernels.__all__) == list(sensikernels.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sensikernels.nonsense  # noqa: B018


def test_bench_is_part_of_the_package():
    module = importlib.import_module("sensikernels.bench.timing")
    assert Path(str(module.__file__)).parent.parent == Path(sensikernels.__file__).parent
