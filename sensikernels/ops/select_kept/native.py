"""Launchers of the compiled kernels."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from sensikernels._core import extension


def select_elements(*arguments: Any) -> None:
    """Exact counts, ties to the lowest entry; arguments as of ``triton.select_elements``."""
    extension.ops().select_elements(*arguments)


def select_units(*arguments: Any) -> float:
    """Fills bits, indices and counts; returns the cost of the minimum."""
    return cast(float, extension.ops().select_units(*arguments))


def fill_in_order(
    cost: Tensor, segment: Tensor, free: Tensor, left: Tensor, prefix: bool, segments: int
) -> Tensor:
    """On a device: what is taken when chunks are met in this order; one launch."""
    arguments = (cost, segment, free, left.contiguous(), prefix, segments)
    return cast(Tensor, extension.ops().fill_in_order(*arguments))


def select_chain(value: Tensor, own: Tensor, passed: Tensor, bins: int) -> Tensor:
    """See ``chain.chain_reference``."""
    return cast(Tensor, extension.ops().select_chain(value, own, passed, bins))
