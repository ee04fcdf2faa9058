"""``SubsetAdamW`` as on a GPU, acted out: its CUDA kernels run on the CPU, its tables are copies.

What a device reads of a table is what lay there when the table was copied: the fixture shows what a
captured step would, when something it reads was not in place.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels.ops.subset_adamw import native

ROOT = Path(__file__).parents[1]
_SOURCE = ROOT / "tests/ops/subset_adamw/shim_library.cpp"


@pytest.fixture(scope="session")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``torch.ops.sensikernels_shim``: the two operators a step on a GPU launches."""
    compiler = shutil.which("g++")
    if compiler is None or not extension.available():
        pytest.skip("no C++ compiler, or no compiled extension to choose")
    path = tmp_path_factory.mktemp("shim") / "kernels.so"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wno-unknown-pragmas",
        f"-I{ROOT / 'csrc'}",
        str(_SOURCE),
        "-o",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = ctypes.CDLL(str(path))
    ops = torch.library.Library("sensikernels_shim", "DEF")
    ops.define(
        "subset_adamw_step(Tensor table, Tensor chunks, Tensor hyper, Tensor partials, "
        "Tensor norm, int dtypes, float max_grad_norm, Tensor? grad_scale, Tensor? found_inf) "
        "-> ()"
    )
    ops.define(
        "subset_adamw_coalesce_sorted(Tensor rows, Tensor order, Tensor values, "
        "Tensor(a!) table, int place) -> (Tensor, Tensor)"
    )
    held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def step(
        table: Tensor,
        chunks: Tensor,
        hyper: Tensor,
        partials: Tensor,
        norm: Tensor,
        dtypes: int,
        max_grad_norm: float,
        *_: None,
    ) -> None:
        kernels.sk_step(
            _at(table),
            _int(len(table)),
            _at(chunks),
            _int(len(chunks)),
            _int(dtypes),
            _at(hyper),
            _at(partials),
            _at(norm),
            ctypes.c_float(max_grad_norm),
        )

    def coalesce(
        rows: Tensor, order: Tensor, values: Tensor, table: Tensor, place: int
    ) -> tuple[Tensor, Tensor]:
        touched, sums = torch.empty(len(rows), dtype=torch.int32), torch.empty_like(values)
        wide = values.numel() // max(len(rows), 1)
        kernels.sk_coalesce(
            _at(rows),
            _at(order),
            _at(values),
            _int(len(rows)),
            _int(wide),
            _at(touched),
            _at(sums),
            _at(table),
            _int(place),
        )
        held[table.data_ptr(), place] = touched, sums  # the table has their addresses
        return touched, sums

    ops.impl("subset_adamw_step", step, "CPU")
    ops.impl("subset_adamw_coalesce_sorted", coalesce, "CPU")
    yield torch.ops.sensikernels_shim
    ops._destroy()


@pytest.fixture
def device_kernels(_library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of ``SubsetAdamW(backend="native")`` on the CPU go the way they go on a GPU."""
    stand_in = SimpleNamespace(ops=lambda: _library, why_not=extension.why_not)
    monkeypatch.setattr(native, "extension", stand_in)
    monkeypatch.setattr(native, "reads_host", lambda device: False)
    monkeypatch.setattr(native, "to_device", lambda table, device: table.clone())


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
