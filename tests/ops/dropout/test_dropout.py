"""Counter dropout: Philox's published vectors, one mask everywhere, an exact mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core import extension, philox
from sensikernels._core.errors import UsageError
from sensikernels.ops.dropout import dropout, explain
from tests.ops.agreement import check_same_bits_on_any_threads

BACKENDS = ["reference", "native"]
SIZES = [0, 1, 15, 16, 127, 128, 129, 5000, 128 * 128 * 3 + 77]


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def test_philox_vectors() -> None:
    """Known answers of Random123 1.09, ``philox4x32 10`` with zero key and counter."""
    words = philox.philox(seed_of(0), torch.zeros((), dtype=torch.int64))
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_native_is_the_reference_to_the_bit(dtype: torch.dtype, n: int) -> None:
    need("native")
    x = torch.randn(n).to(dtype)
    for value in (0, 1, -1, 2**40 + 12345):
        got = dropout(x, 0.1, seed=seed_of(value), backend="native")
        assert torch.equal(got, dropout(x, 0.1, seed=seed_of(value), backend="reference"))
        assert got.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_share_and_mean(backend: str, p: float) -> None:
    need(backend)
    n = 200_000
    y = dropout(torch.ones(n), p, seed=seed_of(7), backend=backend)
    share = float((y != 0).float().mean())
    assert share == pytest.approx(1 - p, abs=4 * (p * (1 - p) / n) ** 0.5)
    threshold = round((1 - p) * 65536)
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(65536 / max(threshold, 1)).item()}
    quarter = (y != 0).view(4, -1).float().mean(1)
    assert float(quarter.std()) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_draws_the_same_mask(backend: str) -> None:
    need(backend)
    x = torch.randn(37, 19, requires_grad=True)
    y = dropout(x, 0.3, backend=backend)
    weight = torch.randn_like(y)
    y.backward(weight)
    kept = y != 0
    scale = 65536 / round(0.7 * 65536)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(kept, weight * scale, 0.0))


def test_gradients_of_gradients() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    seed = seed_of(3)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed=seed), (x,))
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, seed=seed), (x,))


def test_masks_follow_torchs_seed() -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.5))
    assert not torch.equal(first, second)


def test_threads_share_no_state() -> None:
    need("native")
    x = torch.randn(100_000)
    check_same_bits_on_any_threads(lambda: [dropout(x, 0.2, seed=seed_of(11))])


def test_not_finite_is_dropped_or_kept_whole() -> None:
    x = torch.full((4096,), float("nan"))
    y = dropout(x, 0.5, seed=seed_of(2))
    assert set(y.nan_to_num(9.0).unique().tolist()) == {0.0, 9.0}


def test_identity_in_eval_and_at_zero() -> None:
    x = torch.randn(3)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_checks(backend: str) -> None:
    need(backend)
    x = torch.randn(6, 8, 10).permute(2, 0, 1)
    arguments = (x, seed_of(1), 60_000, backend)
    torch.library.opcheck(torch.ops.sensikernels.dropout.default, arguments)
    dense = dropout(x, 0.1, seed=seed_of(1), backend=backend)
    assert torch.equal(dense, dropout(x.contiguous(), 0.1, seed=seed_of(1), backend=backend))


def test_compiles_whole() -> None:
    layer = nn.Linear(16, 16)
    compiled = torch.compile(lambda x: dropout(layer(x), 0.25).sum(), fullgraph=True)
    x = torch.randn(8, 16, requires_grad=True)
    compiled(x).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_bad_arguments() -> None:
    x = torch.randn(3)
    with pytest.raises(UsageError, match=r"p: expected a probability in \[0, 1\], got 1.5"):
        dropout(x, 1.5)
    with pytest.raises(UsageError, match="x: expected a floating dtype"):
        dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="seed: expected int64"):
        dropout(x, seed=torch.tensor(1.0))
    with pytest.raises(UsageError, match="backend: triton cannot serve"):
        dropout(x, backend="triton")
    with pytest.raises(UsageError, match="native cannot serve this call"):
        dropout(x.half(), backend="native")
    assert explain(x.half()).backend == "reference"
