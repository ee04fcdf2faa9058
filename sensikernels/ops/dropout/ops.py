"""The operator ``sensikernels::dropout``; the backend is an argument."""

from __future__ import annotations

from torch import Tensor

from sensikernels._core.checks import expected
from sensikernels.ops.common.checks import check_drops
from sensikernels.ops.common.register import register
from sensikernels.ops.common.rowwise import kernels, resolve


def launch(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    """``x`` with elements dropped by the kernel that ``backend`` names, of checked arguments."""
    y: Tensor = kernels("dropout", backend).dropout(x.contiguous(), seed, threshold)
    return y


def _checked(
    x: Tensor, seed: Tensor, threshold: int, backend: str
) -> tuple[Tensor, Tensor, int, str]:
    if not x.is_floating_point():
        raise expected("x", "a floating dtype", x.dtype)
    check_drops(seed, threshold, x.device)
    return x, seed, threshold, resolve(x, backend)


def _empty(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


register(
    "dropout(Tensor x, Tensor seed, int threshold, str backend) -> Tensor",
    _checked,
    launch,
    _empty,
)
