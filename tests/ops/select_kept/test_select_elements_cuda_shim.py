"""The CUDA selection, run on the CPU under ASan and UBSan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sensikernels.ops.select_kept import select_elements
from sensikernels.ops.select_kept.elements import NEEDS_GRAD, SCORES
from tests.ops.select_kept.cases import entries
from tests.shim import compile_shim, run_shim

HERE = Path(__file__).parent
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(HERE / "shim_select_kept.cpp", tmp_path_factory.mktemp("shim"))


def blob(t: Tensor) -> bytes:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16).numpy().tobytes()


def check(
    program: Path,
    tensors: list[Tensor],
    grads: list[Tensor] | None,
    k,
    score: str,
    capacity: int,
    batch: int = 448,
) -> None:
    per_tensor = not isinstance(k, int)
    pairs = grads or tensors
    head = [len(tensors), list(SCORES).index(score), per_tensor, 3, capacity, batch]
    facts = [
        [
            t.numel(),
            CODES[t.dtype],
            CODES[g.dtype],
            len(blob(t)),
            len(blob(g)),
            k[i] if per_tensor else k,
        ]
        for i, (t, g) in enumerate(zip(tensors, pairs, strict=True))
    ]
    case = np.array([*head, *sum(facts, [])], np.int64).tobytes()
    case += b"".join(blob(t) + blob(g) for t, g in zip(tensors, pairs, strict=True))
    thresholds, counts, data = run_shim(program, stdin=case).strip("\n").split("\n")
    want = select_elements(
        tensors,
        grads,
        k=k,
        score=score,
        backend="reference",
        scope="per_tensor" if per_tensor else "global",
    )
    got = np.array([int(x, 16) for x in thresholds.split()], np.uint32).view(np.float32)
    np.testing.assert_array_equal(got, want.threshold.numpy())
    assert [int(c) for c in counts.split()] == want.counts.tolist()
    packed = torch.cat([want.packed(i) for i in range(len(tensors))])
    assert [int(b) for b in data.split()] == packed.tolist()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("capacity", [8, 100_000])
def test_exact_counts_and_ties(program: Path, score: str, capacity: int):
    tensors = entries([(37, 91), (5,), (40_000,), (1,)], torch.float32)
    grads = entries([(37, 91), (5,), (40_000,), (1,)], torch.bfloat16)
    total = sum(t.numel() for t in tensors)
    for k in (0, 1, total // 10, total - 1, total):
        check(program, tensors, grads if score in NEEDS_GRAD else None, k, score, capacity)
    check(program, tensors, grads if score in NEEDS_GRAD else None, [300, 5, 0, 1], score, capacity)


def test_all_equal_and_several_batches(program: Path):
    tensors = [torch.zeros(3000), torch.zeros(50).half(), torch.ones(7), torch.zeros(70)]
    check(program, tensors, None, 3020, "value", 16, batch=2)
    check(program, tensors, None, [10, 20, 3, 70], "value", 16, batch=3)
