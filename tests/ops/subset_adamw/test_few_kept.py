"""A small share kept, in matrices of several pieces: the walkers that lists and bits take turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sensikernels.optim import SubsetAdamW
from tests.ops.subset_adamw.cases import BACKENDS, KINDS, kept_of

SHAPES = ((300, 512), (41, 1003), (70001,), (64, 96))


def stepped(
    kind: str, share: float, start: list[Tensor], grads: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and row sums after three steps."""
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = SubsetAdamW(params, lr=1e-2, max_grad_norm=1.0, backend=backend)
    sums = {p: (torch.zeros(p.shape[0]), torch.zeros(p.shape[0])) for p in params}
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i, share))
        param.grad = grad
    optimizer.step()
    optimizer.step(fused_statistics=sums)
    optimizer.step()
    return [p.detach() for p in params], [s for pair in sums.values() for s in pair]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_few_kept_entries_move_as_the_definition_says(
    kind: str, share: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    start = [torch.randn(s).to(dtype) for s in SHAPES]
    grads = [torch.randn(s).to(dtype) for s in SHAPES]
    want, want_sums = stepped(kind, share, start, grads, "reference")
    # Two roundings to the narrow dtype may differ by one unit in the last place.
    close = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for backend in BACKENDS[1:]:
        got, got_sums = stepped(kind, share, start, grads, backend)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=1e-6)
        for a, b in zip(got_sums, want_sums, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
