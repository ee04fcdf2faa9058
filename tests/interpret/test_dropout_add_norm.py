"""The kernels of dropout_add_norm against PyTorch's parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.dropout_add_norm import dropout_add_norm
from tests.ops import fused_checks as checks

pytestmark = pytest.mark.interpret
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 17), (2, 9, 100), (40, 129), (37, 384)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_as_good_as_torch(shape: tuple[int, ...], dtype: torch.dtype, p: float):
    checks.check_dropout_add_norm(shape, dtype, "cpu", p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [17, 384])
def test_backward_from_the_output(hidden: int, dtype: torch.dtype):
    leaves = [torch.randn(9, hidden).to(dtype) for _ in range(2)]
    leaves += [torch.rand(hidden) + 0.5, 0.3 * torch.randn(hidden)]

    def parts(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, (hidden,), weight, bias, 1e-12)

    def ours(*a: Tensor) -> Tensor:
        return dropout_add_norm(*a, recover="output", backend="triton")

    checks.check(ours, parts, leaves, torch.randn(9, hidden).to(dtype))
