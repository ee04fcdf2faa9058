"""How float32 products are computed: the fastest way that loses nothing on a CPU, TF32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from sensikernels._core import environment

PRIMITIVES = 16384
"""Shapes oneDNN may keep compiled: a ranked plan needs more than its default of 1,024."""


@contextmanager
def float32_products(device_type: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a run on that type of device, put back after it.

    On a CPU ``medium`` where that rounds nothing: it sends products to oneDNN. With bfloat16 matrix
    units (AMX) it would round them, so there it stays ``highest``. On a GPU ``high``, which is
    TF32. What the user set, if anything, is kept. Enter before the first product: oneDNN reads then
    how many shapes it may keep.
    """
    environment.reserve_primitive_cache(PRIMITIVES)
    with precision(fastest(device_type)):
        yield


def fastest(device_type: str) -> str:
    """The precision that ``float32_products`` sets."""
    chosen = torch.get_float32_matmul_precision()
    if chosen != "highest":
        return chosen
    if device_type != "cpu":
        return "high"
    return "highest" if medium_rounds() else "medium"


@contextmanager
def precision(name: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision(name)`` inside the block alone."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def medium_rounds() -> bool:
    """Whether this CPU's float32 products lose digits at ``medium``, by a product that would."""
    x = torch.full((256, 256), 1 + 2.0**-12, dtype=torch.float32, device="cpu")
    same = torch.eye(256, dtype=torch.float32, device="cpu")
    with precision("medium"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return not torch.equal(x @ same, x)
