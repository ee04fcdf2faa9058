"""The CUDA kernels, run on the CPU under ASan and UBSan, on the layouts the package builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sensikernels.ops.group_reduce import STATISTICS, GroupTable, reference
from sensikernels.ops.group_reduce.table import DTYPE_CODE
from tests.ops.group_reduce.cases import assert_sums, every_group
from tests.shim import compile_shim, run_shim

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(HERE / "shim_group_reduce.cpp", tmp_path_factory.mktemp("shim"))


def storage_of(t: Tensor) -> tuple[bytes, int]:
    """The bytes a tensor spans, and where in them it starts."""
    length = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    words = torch.as_strided(t, (length if t.numel() else 0,), (1,))
    view = words.view(torch.int32 if t.dtype == torch.float32 else torch.int16)
    return view.numpy().tobytes(), 0


def run(program: Path, weights: list[Tensor], grads: list[Tensor], groups: list, resident: int):
    table = GroupTable(weights, grads, groups=groups)
    layout = table.layout
    rows, sizes, blobs = [], [], []
    for i, pair in enumerate(zip(weights, grads, strict=True)):
        pair = [t.contiguous() if layout.flat[i] else t for t in pair]
        spans = [storage_of(t) for t in pair]
        rows.append(
            [
                *(start for _, start in spans),
                *(t.stride(0) if t.dim() else 1 for t in pair),
                *(DTYPE_CODE[t.dtype] for t in pair),
            ]
        )
        for blob, _ in spans:
            sizes.append(len(blob))
            blobs.append(blob)
    mask = (1 << len(STATISTICS)) - 1
    head = [len(weights), len(layout.chunks), layout.groups, len(layout.order)]
    head += [len(layout.members), layout.partials, mask, resident]
    start = np.linspace(0, 1, len(STATISTICS) * layout.groups, dtype=np.float32)
    arrays = [
        np.array(head, np.int64),
        np.array([0.75], np.float32),
        np.array(rows, np.int64),
        np.array(sizes, np.int64),
        layout.chunks,
        layout.starts,
        layout.order,
        layout.members,
    ]
    case = b"".join([*(np.ascontiguousarray(a).tobytes() for a in arrays), *blobs])
    words = run_shim(program, stdin=case + start.tobytes()).split()
    bits = np.array([int(w, 16) for w in words], np.uint32).view(np.float32)
    out = torch.from_numpy(bits.copy()).view(3, len(STATISTICS), layout.groups)
    return out, torch.from_numpy(start).view(len(STATISTICS), layout.groups)


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "mixed", "sliced", "special"])
def test_kernels_equal_the_reference(program: Path, kind: str, resident: int):
    weights, grads, groups = every_group(((6, 150), (40, 24)), kind)
    (got, running, ema), start = run(program, weights, grads, groups, resident)
    assert_sums(got, weights, grads, groups)
    total, mean = start.clone(), start.clone()
    reference.update_states(got, STATISTICS, total, mean, 0.75)
    torch.testing.assert_close(running, total, equal_nan=True)
    torch.testing.assert_close(ema, mean, equal_nan=True)


def test_long_rows_and_many_partials(program: Path):
    weights = [torch.randn(2, 70000), torch.randn(300, 40), torch.randn(7), torch.randn(())]
    grads = [torch.randn_like(w) for w in weights]
    groups = ["tensor", "column", "row", "tensor"]
    (got, _, _), _ = run(program, weights, grads, groups, 2)
    assert_sums(got, weights, grads, groups)
