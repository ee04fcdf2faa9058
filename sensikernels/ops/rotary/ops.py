"""The operator ``sensikernels::rotary``; the backend is an argument."""

from __future__ import annotations

from torch import Tensor

from sensikernels.ops.common.register import register
from sensikernels.ops.common.rowwise import kernels
from sensikernels.ops.rotary.checks import checked


def launch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    """The result by the kernels of ``backend``, of checked arguments; ``inverse``: turned back."""
    x = x if x.stride(2) == 1 else x.contiguous()
    run = kernels("rotary", backend).rotary
    y: Tensor = run(x, cos.contiguous(), sin.contiguous(), inverse)
    return y


def _empty(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


register(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, str backend) -> Tensor",
    checked,
    launch,
    _empty,
)
