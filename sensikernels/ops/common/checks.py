"""Checks of arguments that operators share: each raises UsageError where they are wrong.

An operator is called by its public function, by a traced graph, by an exported program and by
hand; its kernels rely on these checks. A message is formed only where it is raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import expected, require_one_of
from sensikernels._core.philox import DRAWS
from sensikernels.layouts import BlockLayout, CompactLayout, Layout
from sensikernels.ops.common.carried import carried

KERNELS = ("native", "triton")


def described(x: Tensor) -> str:
    """``dtype [shape] on device``, for messages."""
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def check_tensor(
    t: Tensor,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """``t`` is ``dtype`` (None: any floating one) of ``shape`` on ``device``."""
    typed = t.is_floating_point() if dtype is None else t.dtype == dtype
    if not typed or t.shape != shape or t.device != device:
        kind = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        raise expected(name, f"{kind} {list(shape)} on {device}", described(t))


def check_rank(t: Tensor, name: str, rank: int) -> None:
    """``t`` is floating with ``rank`` dimensions."""
    if not t.is_floating_point() or t.dim() != rank:
        raise expected(name, f"a floating tensor of {rank} dimensions", described(t))


def check_drops(seed: Tensor | None, threshold: int, device: torch.device) -> None:
    """``threshold`` of 65,536 draws are kept; without a ``seed`` all must be."""
    if not 0 <= threshold <= DRAWS:
        raise expected("threshold", f"a number from 0 to {DRAWS}", threshold)
    if seed is not None:
        check_tensor(seed, "seed", (), torch.int64, device)
    elif threshold != DRAWS:
        raise expected("seed", f"int64 [] on {device}, as threshold is {threshold}", None)


def check_count(values: Sequence[object], name: str, count: int) -> None:
    """A list has ``count`` entries."""
    if len(values) != count:
        raise expected(name, f"{count} entries", len(values))


def check_kernels(backend: str, x: Tensor) -> None:
    """``backend`` names kernels that run where ``x`` is."""
    if backend not in KERNELS:
        require_one_of(backend, "backend", KERNELS)
    if backend == "triton" and not (x.is_cuda or x.is_meta or environment.interpreting()):
        raise expected("backend", "a CUDA tensor for triton", f"triton with x on {x.device}")


def check_layout(layout: Layout, x: Tensor) -> None:
    """``layout`` is one, on x's device."""
    if not layout.sound:
        layout.check()
    if layout.device is not None and layout.device != x.device:
        raise expected("layout", f"index tensors on {x.device}", layout.device)


def product_layout(
    dy: Tensor, sizes: Sequence[int], index: Sequence[Tensor], backend: str
) -> CompactLayout | BlockLayout:
    """The layout that arguments describe, beside ``dy [T, out_width]`` and its kernels."""
    check_kernels(backend, dy)
    check_rank(dy, "dy", 2)
    layout = carried(sizes, index)
    check_layout(layout, dy)
    if dy.shape[1] != layout.out_width:
        raise expected("dy", f"[T, {layout.out_width}]", list(dy.shape))
    return layout


def check_activation(dy: Tensor, pre: Tensor, backend: str) -> None:
    """``dy`` and ``pre`` are matrices of one shape and dtype."""
    check_kernels(backend, dy)
    check_rank(dy, "dy", 2)
    check_tensor(pre, "pre", dy.shape, dy.dtype, dy.device)
