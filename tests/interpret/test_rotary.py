"""The kernel of rotary against PyTorch's parts."""

from __future__ import annotations

import pytest
import torch

from tests.ops import fused_checks as checks

pytestmark = pytest.mark.interpret
DTYPES = [torch.float32, torch.float16]
SHAPES = [(0, 2, 8), (3, 0, 8), (3, 2, 0), (1, 1, 2), (33, 6, 64), (9, 3, 34), (2, 2, 300)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_as_good_as_torch(shape: tuple[int, int, int], dtype: torch.dtype, fused: bool):
    checks.check_rotary(shape, dtype, "cpu", fused=fused)
