"""Which form of a masked linear runs, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels import _settings
from sensikernels._checks import require, require_one_of
from sensikernels.dispatch import Choice, break_even, tokens_log2
from sensikernels.layouts import BlockLayout, ElementLayout, Layout, PackedLayout, density

_DENSE = Choice(form="dense", backend="torch", reason="asked for by name")
_PACKED = Choice(form="packed", backend="torch", reason="nothing to gather or scatter")


def choose(layout: Layout, x: Tensor, backend: str) -> Choice:
    """The form that serves ``x``; ``auto`` takes the fastest known one.

    Raises:
        UsageError: a named backend cannot serve this layout or device.
    """
    if backend == "reference":
        return _DENSE
    if isinstance(layout, ElementLayout):
        reason = "single elements run dense on the unpacked weight"
        require(backend == "auto", "backend", f"auto or reference ({reason})", backend)
        return Choice(form="dense", backend="torch", reason=reason)
    if backend == "triton":
        ok = x.is_cuda or _settings.interpreting()
        require(ok, "backend", "a CUDA tensor for triton", f"triton with x on {x.device}")
        return Choice(form=_form(layout), backend="triton", reason="asked for by name")
    if backend == "native":
        ok = isinstance(layout, PackedLayout) or not x.is_cuda
        require(ok, "backend", "triton for blocks on a GPU", "native")
        runs = "torch" if isinstance(layout, PackedLayout) else "native"
        return Choice(form=_form(layout), backend=runs, reason="asked for by name")
    require_one_of(backend, "backend", _settings.BACKENDS)
    if isinstance(layout, PackedLayout) and layout.direct:
        return _PACKED
    return _auto(layout, x)


def _auto(layout: PackedLayout | BlockLayout, x: Tensor) -> Choice:
    form = _form(layout)
    block = min(layout.block_shape) if isinstance(layout, BlockLayout) else 0
    limit, source = break_even(x.device, form, x.dtype, block, tokens_log2(x))
    kept = density(layout)
    relation = ">" if kept > limit else "<="
    reason = f"density {kept:.3g} {relation} break-even {limit:.3g} ({source})"
    if kept > limit:
        return Choice(form="dense", backend="torch", reason=reason)
    if isinstance(layout, PackedLayout):
        return Choice(form=form, backend="torch", reason=reason)
    return Choice(form=form, backend="triton" if x.is_cuda else "native", reason=reason)


def _form(layout: PackedLayout | BlockLayout) -> str:
    return "packed" if isinstance(layout, PackedLayout) else "block-sparse"


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
    return choose(layout, x, _settings.backend() if backend == "auto" else backend)
