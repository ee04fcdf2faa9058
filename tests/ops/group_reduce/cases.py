"""Inputs and groupings shared by the group_reduce tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.group_reduce import STATISTICS, reference
from tests.tolerance import assert_close_to_reference


def element_ids(shape: tuple[int, int]) -> tuple[str, Tensor, int]:
    return ("ids", torch.randint(-1, 4, shape, dtype=torch.int32), 5)


def row_ids(shape: tuple[int, int]) -> tuple[str, Tensor, int]:
    return ("ids", torch.randint(-1, 4, shape[:1], dtype=torch.int32), 5)


GROUPS = [
    lambda shape: "tensor",
    lambda shape: "row",
    lambda shape: "column",
    lambda shape: ("head", 2),
    lambda shape: ("head", 2, 1),
    lambda shape: ("block", 4, 16),
    lambda shape: ("block", 1, 1),
    lambda shape: ("block", 100, 7),
    lambda shape: ("block", 1, shape[1] // 2),
    element_ids,
    row_ids,
]
"""Each makes the group of one ``[rows, columns]`` tensor."""


def inputs(shape: tuple[int, ...], kind: str) -> tuple[Tensor, Tensor]:
    """A weight and a gradient of a named kind."""
    w, g = torch.randn(shape), torch.randn(shape)
    if kind == "mixed":
        dtypes = (torch.bfloat16, torch.float16)
        first = torch.randint(2, ()).item()
        return w.to(dtypes[first]), g.to(dtypes[1 - first])
    if kind == "sliced":
        wide = torch.full((2, shape[0], shape[1] + 5), float("nan"))
        wide[0, :, 3:-2], wide[1, :, 1:-4] = w, g
        return wide[0, :, 3:-2], wide[1, :, 1:-4]
    if kind == "transposed":
        return w.t().contiguous().t(), g
    if kind == "special":
        w.view(-1)[3], g.view(-1)[5], g.view(-1)[-1] = float("inf"), float("nan"), float("-inf")
    return w, g


def assert_sums(got: Tensor, weights: list[Tensor], grads: list[Tensor], groups: list) -> None:
    """All statistics, ``[statistics, groups]``, as good as PyTorch's against float64.

    A sum of signed terms may cancel to anything, and PyTorch's error with it: it is held to four
    roundings of the root of the sum of squares.
    """
    same = reference.group_reduce(weights, grads, STATISTICS, groups)
    wide = [[t.double() for t in ts] for ts in (weights, grads)]
    exact = reference.group_reduce(*wide, STATISTICS, groups)
    for s, name in enumerate(STATISTICS):
        if name != "sum_wg":
            assert_close_to_reference(got[s], same[s], exact[s])
            continue
        finite = exact[s].isfinite()
        assert torch.equal(got[s][~finite].nan_to_num(7), exact[s][~finite].float().nan_to_num(7))
        scale = exact[STATISTICS.index("sum_wg_squared")].sqrt()
        eps = torch.finfo(torch.float32).eps
        error, other = ((t[s] - exact[s])[finite].abs() for t in (got, same))
        if finite.any():
            largest = (scale + exact[s].abs())[finite].max()
            assert error.max() <= 2 * other.max() + 4 * eps * largest


def every_group(
    shapes: tuple[tuple[int, int], ...], kind: str
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Weights, gradients and groups: each of ``GROUPS`` over each shape."""
    weights, grads, groups = [], [], []
    for group in GROUPS:
        for shape in shapes:
            w, g = inputs(shape, kind)
            weights.append(w)
            grads.append(g)
            groups.append(group(shape))
    return weights, grads, groups
