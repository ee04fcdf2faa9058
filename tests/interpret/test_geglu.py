"""The kernels of geglu against PyTorch's parts."""

from __future__ import annotations

import pytest
import torch

from tests.ops import fused_checks as checks

pytestmark = pytest.mark.interpret
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 2), (2, 9, 100), (130, 600)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_as_good_as_torch(shape: tuple[int, ...], dtype: torch.dtype, biased: bool):
    checks.check_geglu(shape, dtype, "cpu", biased=biased)
