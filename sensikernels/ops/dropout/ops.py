"""The operator ``sensikernels::dropout``; the backend is an argument."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.dropout import native, reference

_LIB = torch.library.Library("sensikernels", "FRAGMENT")
_LIB.define("dropout(Tensor x, Tensor seed, int threshold, str backend) -> Tensor")


def _dropout(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    x = x.contiguous()
    if backend == "native":
        return native.dropout(x, seed, threshold)
    if backend == "triton":
        from sensikernels.ops.dropout import triton

        return triton.dropout(x, seed, threshold)
    return reference.dropout(x, seed, threshold)


for _device in ("CPU", "CUDA"):
    _LIB.impl("dropout", _dropout, _device)


@torch.library.register_fake("sensikernels::dropout")
def _(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)
