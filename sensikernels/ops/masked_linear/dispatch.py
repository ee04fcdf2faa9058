"""Which form of a masked linear runs, and why."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import require, require_one_of
from sensikernels.layouts import BlockLayout, CompactLayout, ElementLayout, Layout
from sensikernels.ops.common.columns import fused_activation
from sensikernels.ops.common.dispatch import Choice, break_even, compare


def choose(layout: Layout, x: Tensor, backend: str, *, explaining: bool = False) -> Choice:
    """The form that serves ``x``; ``auto`` takes the fastest known one.

    Raises:
        UsageError: a named backend cannot serve this layout or device.
    """
    if backend == "auto" and not isinstance(layout, ElementLayout):
        direct = isinstance(layout, CompactLayout) and layout.direct
        return _DIRECT if direct else _auto(layout, x, explaining)
    if backend == "reference":
        return _DENSE
    if isinstance(layout, ElementLayout):
        require(backend == "auto", "backend", f"auto or reference ({_ELEMENTS.reason})", backend)
        return _ELEMENTS
    if backend == "triton":
        ok = x.is_cuda or environment.interpreting()
        require(ok, "backend", "a CUDA tensor for triton", f"triton with x on {x.device}")
        return _NAMED[_form(layout), "triton"]
    if backend != "native":
        require_one_of(backend, "backend", environment.BACKENDS)
    if isinstance(layout, CompactLayout):
        return _NAMED["compact", "torch"]
    require(not x.is_cuda, "backend", "triton for blocks on a GPU", "native")
    return _NAMED["block-sparse", "native"]


def _auto(layout: CompactLayout | BlockLayout, x: Tensor, explaining: bool) -> Choice:
    if explaining or torch.compiler.is_compiling():
        return _measured(layout, x, explaining)
    key = (x.dtype, (x.numel() // (layout.in_width or 1)).bit_length())
    choice: Choice | None = layout.chosen.get(key)
    if choice is None:
        choice = layout.chosen[key] = _measured(layout, x, explaining)
    return choice


def _measured(layout: CompactLayout | BlockLayout, x: Tensor, explaining: bool) -> Choice:
    form = _form(layout)
    block = min(layout.block_shape) if isinstance(layout, BlockLayout) else 0
    limit, source = break_even(x, form, block)
    kept = layout.density
    if isinstance(layout, CompactLayout):
        # The scatter in the epilogue spares a pass over y; chosen columns are saved, so gathered.
        rows_alone = layout.scatter_rows is not None and layout.gather_columns is None
        served = "triton" if rows_alone and fused_activation(x) else "torch"
    else:
        served = "triton" if x.is_cuda else "native"
    chosen = _AUTO["dense", "torch"] if kept > limit else _AUTO[form, served]
    return replace(chosen, reason=compare(kept, limit, source)) if explaining else chosen


def _form(layout: CompactLayout | BlockLayout) -> str:
    return "compact" if isinstance(layout, CompactLayout) else "block-sparse"


_DENSE = Choice(form="dense", backend="torch", reason="asked for by name")
_DIRECT = Choice(form="compact", backend="torch", reason="nothing to gather or scatter")
_ELEMENTS = Choice(
    form="dense", backend="torch", reason="single elements run dense on the full weight"
)
_FORMS = (
    ("dense", "torch"),
    ("compact", "torch"),
    ("compact", "triton"),
    ("block-sparse", "native"),
    ("block-sparse", "triton"),
)
_NAMED = {f: Choice(form=f[0], backend=f[1], reason="asked for by name") for f in _FORMS}
_AUTO = {f: Choice(form=f[0], backend=f[1], reason="") for f in _FORMS}


def explain(
    layout: Layout,
    *,
    tokens: int = 1024,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Choice:
    """What ``masked_linear`` would run for ``tokens`` rows of ``dtype`` on ``device``, and why."""
    x = torch.empty(1, dtype=dtype, device=device).expand(tokens, layout.in_width)
    named = environment.backend() if backend == "auto" else backend
    return choose(layout, x, named, explaining=True)
