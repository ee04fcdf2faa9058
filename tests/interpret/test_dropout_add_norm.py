"""The kernels of dropout_add_norm against PyTorch's parts."""

from __future__ import annotations

import pytest
import torch

from tests.ops import fused_checks as checks

pytestmark = pytest.mark.interpret
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 17), (2, 9, 100), (40, 129), (37, 384)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_as_good_as_torch(shape: tuple[int, ...], dtype: torch.dtype, p: float):
    checks.check_dropout_add_norm(shape, dtype, "cpu", p)
