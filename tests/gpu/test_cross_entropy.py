"""cross_entropy on a GPU, at BERT's vocabulary and at odd widths."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cross_entropy import cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 614])
@pytest.mark.parametrize("classes", [1, 2, 100, 4096, 4097, 30522])
@pytest.mark.parametrize("kept", ["all", "some", "one"])
def test_as_good_as_torch(rows: int, classes: int, dtype: torch.dtype, kept: str):
    cases.check_kernels(rows, classes, dtype, "cuda", kept)


def test_odd_labels():
    cases.check_odd_labels("cuda")


def test_nothing_waits_for_the_device():
    logits, labels = cases.draw(64, 500, torch.float32, "some", "cuda")
    cases.run(cases.cross_entropy, logits, labels)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.run(cases.cross_entropy, logits, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
