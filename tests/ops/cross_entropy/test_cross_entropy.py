"""Cross-entropy: as good as PyTorch's, rows that do not count, labels that are no class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from sensikernels.ops.cross_entropy import cross_entropy, explain
from tests.ops.agreement import check_compiles_whole, check_same_bits_on_any_threads
from tests.ops.cross_entropy.cases import draw, run
from tests.tolerance import assert_close_to_reference

BACKENDS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 2), (32, 2), (7, 16), (5, 17), (33, 3), (300, 100), (40, 30522)]
_OPS = torch.ops.sensikernels


def need(backend: str) -> None:
    if backend == "native" and not extension.available():
        pytest.skip("no compiled extension")


def ours(backend: str, **named: int) -> Callable[..., Tensor]:
    return lambda logits, labels: cross_entropy(logits, labels, backend=backend, **named)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", ["all", "some", "one"])
def test_as_good_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, int], kept: str):
    need(backend)
    logits, labels = draw(*shape, dtype, kept)
    got = run(ours(backend), logits, labels)
    same = run(F.cross_entropy, logits, labels)
    exact = run(F.cross_entropy, logits.double(), labels)
    assert got[0].dtype == torch.float32
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(one, torch_own.to(one.dtype), truth)
    assert not got[1][labels == -100].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_keep_their_digits(backend: str):
    """A large offset of all logits of a row must not cost the digits of their differences."""
    need(backend)
    logits, labels = draw(9, 50, torch.float32, "all")
    shifted = logits + torch.tensor([0.0, 1e4, -1e4])[torch.arange(9) % 3][:, None]
    got = run(ours(backend), shifted, labels)
    for one, truth in zip(got, run(F.cross_entropy, shifted.double(), labels), strict=True):
        assert float((one - truth).abs().max()) < 3e-7 * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_scales_with_the_losses(backend: str):
    need(backend)
    logits, labels = draw(6, 9, torch.float32, "some")
    (got,) = torch.autograd.grad(
        cross_entropy(leaf := logits.requires_grad_(), labels, backend=backend) * -3.5, leaf
    )
    (truth,) = torch.autograd.grad(F.cross_entropy(leaf, labels) * -3.5, leaf)
    torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 5)], ids=str)
def test_no_row_counts(backend: str, shape: tuple[int, int]):
    need(backend)
    logits, labels = torch.randn(shape), torch.full(shape[:1], -100)
    loss, gradient = run(ours(backend), logits, labels)
    assert loss.isnan()
    assert F.cross_entropy(logits, labels).isnan()
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_not_read(backend: str):
    need(backend)
    logits, labels = draw(6, 40, torch.float32, "some")
    wanted = run(ours(backend), logits, labels)
    logits[labels == -100] = float("nan")
    got = run(ours(backend), logits, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    other = labels.where(labels != -100, 3)
    got = run(ours(backend, ignore_index=3), logits, other)
    truth = run(lambda x, y: F.cross_entropy(x, y, ignore_index=3), logits.nan_to_num(), other)
    for one, other_one in zip(got, truth, strict=True):
        torch.testing.assert_close(one, other_one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_as_torchs(backend: str, value: float):
    need(backend)
    logits, labels = torch.randn(3, 20), torch.tensor([4, 5, 6])
    for row in (logits[1, 7:8], logits[1]):
        row.fill_(value)
        got, truth = (run(f, logits, labels) for f in (ours(backend), F.cross_entropy))
        for one, other in zip(got, truth, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_that_is_no_class(backend: str, label: int):
    need(backend)
    labels = torch.tensor([0, label, 4])
    with pytest.raises(UsageError, match=rf"0 to 4 or -100, got {label} in row 1"):
        cross_entropy(torch.randn(3, 5), labels, backend=backend)


def test_the_definition_is_nan_where_nobody_waits():
    from sensikernels.ops.cross_entropy import reference

    logits, labels = torch.randn(3, 5), torch.tensor([0, 7, -100])
    loss, stats, scale = reference.cross_entropy(logits, labels, -100)
    gradient = reference.cross_entropy_backward(torch.ones(()), logits, labels, stats, scale, -100)
    assert loss.isnan()
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_one_and_two_threads_sum_alike():
    need("native")
    logits, labels = draw(500, 300, torch.float32, "some")
    check_same_bits_on_any_threads(lambda: run(cross_entropy, logits, labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous_and_narrow_labels(backend: str):
    need(backend)
    logits, labels = torch.randn(40, 12).t()[:, ::2], torch.randint(20, (24,))[::2].int()
    got = run(ours(backend), logits, labels)
    truth = run(F.cross_entropy, logits, labels.long())
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one, other)


def test_saves_two_floats_a_row_beside_what_there_was():
    need("native")
    logits, labels = torch.randn(6, 50, requires_grad=True), torch.randint(50, (6,))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(logits, labels)
    new = [t for t in saved if t.data_ptr() not in (logits.data_ptr(), labels.data_ptr())]
    assert sum(t.numel() for t in new) == 2 * 6 + 1


def test_gradients_of_gradients():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 4, 0])
    assert explain(logits).backend == "reference"
    assert torch.autograd.gradcheck(cross_entropy, (logits, labels))
    assert torch.autograd.gradgradcheck(cross_entropy, (logits, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_checks(backend: str, dtype: torch.dtype):
    need(backend)
    logits, labels = draw(6, 9, dtype, "some")
    torch.library.opcheck(_OPS.cross_entropy.default, (logits, labels, -100, backend))
    _, stats, scale = _OPS.cross_entropy(logits, labels, -100, backend)
    arguments = (torch.ones(()), logits, labels, stats, scale, -100, backend)
    torch.library.opcheck(_OPS.cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend: str):
    need(backend)
    for dtype in DTYPES:
        logits, labels = draw(6, 9, dtype, "some")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradient = run(ours(backend), logits, labels)
        assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
        assert torch.equal(loss, cross_entropy(logits, labels, backend=backend))


def test_compiles_whole():
    layer, labels = nn.Linear(16, 32), torch.randint(32, (8,))
    f = lambda x: cross_entropy(layer(x), labels)  # noqa: E731
    check_compiles_whole(f, layer, torch.randn(8, 16))


def test_bad_arguments():
    logits, labels = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    for wrong in (logits.long(), logits[0], logits[:, :0]):
        with pytest.raises(UsageError, match=r"logits: expected floating \[rows, classes >= 1\]"):
            cross_entropy(wrong, labels)
    for wrong in (labels[:2], labels.float(), labels[:, None]):
        with pytest.raises(UsageError, match=r"labels: expected int64 \[3\] on cpu, got torch"):
            cross_entropy(logits, wrong)
    with pytest.raises(UsageError, match="native cannot serve this call"):
        cross_entropy(logits.half(), labels, backend="native")
    with pytest.raises(UsageError, match="triton cannot serve"):
        cross_entropy(logits, labels, backend="triton")
