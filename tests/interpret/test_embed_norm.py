"""The kernels of embed_norm against PyTorch's parts."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sensikernels.ops.common.drops import Drop
from sensikernels.ops.embed_norm import embed_norm
from sensikernels.ops.embed_norm.reference import Lookup
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


def test_an_id_of_no_row_is_nan_and_reads_nothing():
    """On a GPU no id is looked at beforehand; the others are not touched by a wrong one."""
    from sensikernels.ops.embed_norm import triton as kernels

    tables = [torch.randn(n, 100) for n in (5, 3, 2)]
    ids = [torch.tensor(i) for i in ([0, 4, 1, 2], [0, 1, 2, 2], [0, 1, 0, 1])]
    affine = torch.ones(100), torch.zeros(100)
    none = Drop(None, 65536)
    want, _ = kernels.forward(Lookup(ids, tables), *affine, none, 1e-12)
    for table, wrong in product(range(3), (-1, 5, 1 << 40)):
        damaged = [i.clone() for i in ids]
        damaged[table][2] = wrong
        lookup = Lookup(damaged, tables)
        y, moments = kernels.forward(lookup, *affine, none, 1e-12)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], want[[0, 1, 3]])
        dsum, _ = kernels.backward(torch.ones(4, 100), lookup, moments, affine[0], none, True)
        assert dsum[2].isnan().all()
        assert dsum[[0, 1, 3]].isfinite().all()


def test_a_constant_row_is_the_bias():
    values = torch.cat([torch.randn(9), torch.logspace(-9, 9, 7)])
    for width in (3, 17, 100, 384):
        rows, ids = values[:, None].expand(-1, width).contiguous(), torch.arange(16)
        none, bias = torch.zeros(16, dtype=torch.int64), torch.randn(width)
        tables = rows, torch.zeros(1, width), torch.zeros(1, width)
        call = (ids, none, none, *tables, torch.ones(width), bias)
        got = embed_norm(*call, backend="triton")
        assert torch.equal(got, bias.expand(16, -1))
