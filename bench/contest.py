"""A contest of an operator against what else a user could run, timed by pytest-benchmark.

Each contestant is one test; those of a case share a group, so that they stand together in the
report. All of them must agree before any is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

OURS, COMPILED = "sensikernels", "torch-compiled"
ROUNDS = 20
Run = Callable[[], Sequence[Tensor]]


def contestants(*names: str) -> pytest.MarkDecorator:
    """One test a contestant, ours first."""
    return pytest.mark.parametrize("name", [OURS, *names])


def measure(
    benchmark: Any,
    group: str,
    name: str,
    runs: Mapping[str, Run],
    *,
    tolerance: float | None = 1e-2,
    truth: Run | None = None,
) -> None:
    """Time ``runs[name]`` in ``group`` once ours and it give the same tensors.

    ``tolerance``: of the largest entry of each tensor; None where the two are not comparable, as
    dropout by two generators is not. ``truth``: the run to hold ours against, where the contestant
    itself is too coarse.
    """
    if tolerance is not None:
        for ours, theirs in zip(runs[OURS](), (truth or runs[name])(), strict=True):
            scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(
                ours.float(), theirs.float(), rtol=0, atol=tolerance * scale + 1e-6
            )
    benchmark.group = group
    benchmark.extra_info.update(device=_device(runs[name]()), torch=torch.__version__)
    benchmark.pedantic(_waiting(runs[name]), rounds=ROUNDS, warmup_rounds=2)


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *, compiled: bool = False
) -> Run:
    """A run of ``function`` on ``inputs`` and of its gradients; gives the output, then those."""
    call = torch.compile(function) if compiled else function
    leaves = [x for x in inputs if x.requires_grad]
    y = function(*inputs)
    dy = normal(*y.shape, dtype=y.dtype, device=str(y.device), grad=False)

    def run() -> list[Tensor]:
        y = call(*inputs)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return run


def normal(*shape: int, dtype: torch.dtype, device: str, grad: bool = True) -> Tensor:
    """The same normal numbers at every call of the same shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    made = torch.randn(shape, generator=generator).to(device, dtype)
    return made.requires_grad_(grad)


def _device(outputs: Sequence[Tensor]) -> str:
    device = outputs[0].device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _waiting(run: Run) -> Callable[[], object]:
    """``run``, and on a GPU until the device has done it."""

    def timed() -> object:
        outputs = run()
        if outputs[0].is_cuda:
            torch.cuda.synchronize()
        return outputs

    return timed
