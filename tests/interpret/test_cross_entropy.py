"""The kernels of cross_entropy against PyTorch."""

from __future__ import annotations

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.ops.cross_entropy import checks
from tests.ops.cross_entropy import cases

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (32, 2), (7, 100), (3, 4097), (4, 30522)], ids=str)
@pytest.mark.parametrize("kept", ["all", "some"])
def test_as_good_as_torch(shape: tuple[int, int], dtype: torch.dtype, kept: str):
    cases.check_kernels(*shape, dtype, "cpu", kept)


def test_odd_labels(monkeypatch: pytest.MonkeyPatch):
    """On a CPU they are refused; the kernel itself, as on a GPU, makes their rows NaN."""
    with pytest.raises(UsageError, match="labels: expected a class from 0 to 4999"):
        cases.check_odd_labels("cpu")
    monkeypatch.setattr(checks, "readable", lambda labels: False)
    cases.check_odd_labels("cpu")
