"""What forms the gradient of the kept entries, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import require, require_one_of
from sensikernels.layouts import BlockLayout, CompactLayout, ElementLayout, Layout
from sensikernels.ops.common.dispatch import Choice, break_even, compare


def choose(layout: Layout, x: Tensor, backend: str, *, explaining: bool = False) -> Choice:
    """The form that serves ``x``; ``auto`` takes the fastest known one.

    Raises:
        UsageError: a named backend cannot serve this layout or device.
    """
    if backend == "reference":
        return _REFERENCE
    if isinstance(layout, ElementLayout):
        require(backend == "auto", "backend", f"auto or reference ({_ELEMENTS.reason})", backend)
        return _ELEMENTS
    if backend == "triton":
        ok = x.is_cuda or environment.interpreting()
        require(ok, "backend", "a CUDA tensor for triton", f"triton with x on {x.device}")
        return _TRITON
    if backend not in ("auto", "native"):
        require_one_of(backend, "backend", environment.BACKENDS)
    if isinstance(layout, CompactLayout):
        return _COMPACT
    if backend == "native":
        require(not x.is_cuda, "backend", "triton for blocks on a GPU", "native")
        return _NATIVE
    return _auto(layout, x, explaining)


def _auto(layout: BlockLayout, x: Tensor, explaining: bool) -> Choice:
    """Blocks against one GEMM over all rows and columns that have a kept block."""
    block = min(layout.block_shape)
    limit, source = break_even(x, "selective", block)
    rows = layout.shape[0] if layout.rows is None else layout.rows.shape[0]
    columns = layout.shape[1] if layout.columns is None else layout.columns.shape[0]
    share = layout.kept_entries / (rows * columns)
    dense = share > limit
    return Choice(
        form="dense" if dense else "selective",
        backend="torch" if dense else "triton" if x.is_cuda else "native",
        reason=compare(share, limit, source) if explaining else "",
    )


_REFERENCE = Choice(form="dense", backend="reference", reason="asked for by name")
_ELEMENTS = Choice(
    form="dense",
    backend="torch",
    reason="single elements take a dense gradient, of which the kept entries stay",
)
_TRITON = Choice(form="selective", backend="triton", reason="asked for by name")
_NATIVE = Choice(form="selective", backend="native", reason="asked for by name")
_COMPACT = Choice(form="compact", backend="torch", reason="one GEMM on the kept rows and columns")


def explain(
    layout: Layout,
    *,
    tokens: int = 1024,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Choice:
    """What forms the gradient for ``tokens`` rows of ``dtype`` on ``device``, and why."""
    x = torch.empty(1, dtype=dtype, device=device).expand(tokens, layout.shape[1])
    named = environment.backend() if backend == "auto" else backend
    return choose(layout, x, named, explaining=True)
