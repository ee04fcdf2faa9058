"""The operator ``sensikernels::dropout``; the backend is an argument."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.common.checks import check_drops
from sensikernels.ops.common.rowwise import resolve
from sensikernels.ops.dropout import native, reference

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define("dropout(Tensor x, Tensor seed, int threshold, str backend) -> Tensor")


def _check(x: Tensor, seed: Tensor, threshold: int) -> None:
    if not x.is_floating_point():
        require(False, "x", "a floating dtype", x.dtype)
    check_drops(seed, threshold, x.device)


def launch(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    """Checked arguments to the kernel that ``backend`` names."""
    x = x.contiguous()
    if backend == "native":
        return native.dropout(x, seed, threshold)
    if backend == "triton":
        from sensikernels.ops.dropout import triton

        return triton.dropout(x, seed, threshold)
    return reference.dropout(x, seed, threshold)


def _dropout(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    _check(x, seed, threshold)
    return launch(x, seed, threshold, resolve(x, backend))


for _device in ("CPU", "CUDA"):
    _LIB.impl("dropout", _dropout, _device)


@torch.library.register_fake("sensikernels::dropout")
def _(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    _check(x, seed, threshold)
    resolve(x, backend)
    return x.new_empty(x.shape)
