"""The fused elementwise operators on a GPU, at BERT's widths and at odd ones."""

from __future__ import annotations

import pytest
import torch

from tests.ops import fused_checks as checks

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 17, 416, 4096]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 100, 1536, 3072, 4096])
@pytest.mark.parametrize("biased", [True, False])
def test_bias_gelu(rows: int, width: int, dtype: torch.dtype, biased: bool):
    checks.check_bias_gelu((rows, width), dtype, "cuda", biased=biased)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [2, 100, 2304, 5248])
@pytest.mark.parametrize("biased", [True, False])
def test_geglu(rows: int, width: int, dtype: torch.dtype, biased: bool):
    checks.check_geglu((rows, width), dtype, "cuda", biased=biased)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 34), (12, 64), (8, 128), (2, 300)])
@pytest.mark.parametrize("fused", [True, False])
def test_rotary(tokens: int, heads: int, size: int, dtype: torch.dtype, fused: bool):
    checks.check_rotary((tokens, heads, size), dtype, "cuda", fused=fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", [17, 100, 384, 768, 1000, 1024, 4096])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_dropout_add_norm(rows: int, hidden: int, dtype: torch.dtype, p: float):
    checks.check_dropout_add_norm((rows, hidden), dtype, "cuda", p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", [17, 384, 768, 1024])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_embed_norm(rows: int, hidden: int, dtype: torch.dtype, p: float):
    checks.check_embed_norm((rows,), hidden, dtype, "cuda", p, sparse=True)
