"""The kernels of embed_norm against PyTorch's parts."""

from __future__ import annotations

import pytest
import torch

from tests.ops import fused_checks as checks

pytestmark = pytest.mark.interpret
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [17, 100, 384])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_as_good_as_torch(hidden: int, dtype: torch.dtype, p: float):
    for shape in ((0,), (1,), (2, 20)):
        checks.check_embed_norm(shape, hidden, dtype, "cpu", p)
    checks.check_embed_norm((2, 20), hidden, dtype, "cpu", p, sparse=True)
