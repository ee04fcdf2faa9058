"""Logits and labels, and the checks that the interpreter and a GPU share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels.ops.cross_entropy import cross_entropy
from tests.tolerance import assert_close_to_reference


def draw(
    rows: int, classes: int, dtype: torch.dtype, kept: str, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which all, some or one are not -100."""
    logits = (torch.randn(rows, classes, device=device) * 3).to(dtype)
    labels = torch.randint(classes, (rows,), device=device)
    row = torch.arange(rows, device=device)
    dropped = {"all": row < 0, "some": row % 3 == 1, "one": row > 0}[kept]
    return logits, labels.where(~dropped, -100)


def run(f: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and gradient."""
    leaf = logits.detach().clone().requires_grad_()
    loss = f(leaf, labels)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def check_kernels(rows: int, classes: int, dtype: torch.dtype, device: str, kept: str) -> None:
    """The Triton kernels against PyTorch in the same dtype and in float64; the same bits twice."""
    logits, labels = draw(rows, classes, dtype, kept, device)

    def kernels(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x, y, backend="triton")

    got = run(kernels, logits, labels)
    same = run(F.cross_entropy, logits, labels)
    exact = run(F.cross_entropy, logits.double(), labels)
    for one, torch_own, truth in zip(got, same, exact, strict=True):
        assert_close_to_reference(one, torch_own.to(one.dtype), truth)
    again = run(kernels, logits, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def check_odd_labels(device: str) -> None:
    """No row, no labelled row, ignored rows of NaN, and a label that is no class."""
    for rows in (0, 3):
        labels = torch.full((rows,), -100, device=device)
        logits = torch.full((rows, 5), torch.nan, device=device)
        loss, gradient = run(lambda x, y: cross_entropy(x, y, backend="triton"), logits, labels)
        assert loss.isnan()
        assert not gradient.any()
    logits = torch.randn(4, 5000, device=device)
    labels = torch.tensor([3, 5000, -100, -1], device=device)
    loss, gradient = run(lambda x, y: cross_entropy(x, y, backend="triton"), logits, labels)
    assert loss.isnan()
    assert gradient.isnan().all(1).tolist() == [False, True, False, True]
    assert gradient[[0, 2]].isfinite().all()
