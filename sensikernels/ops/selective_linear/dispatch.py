"""Choice of the form in which the gradient of the kept entries is computed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.compile import constant_when_traced
from sensikernels.layouts import BlockLayout, Layout
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.common.dispatch import TRACED, break_even, compare, remembered, traced_limit


def choice(layout: Layout, x: Tensor, backend: str = "auto") -> Choice:
    """The form that serves ``x``, and why; ``auto`` takes the fastest known.

    Raises:
        UsageError: a named backend cannot serve this layout or device.
    """
    blocks = isinstance(layout, BlockLayout)
    if torch.compiler.is_compiling():
        faster = "selective"
        if blocks:
            limit = traced_limit(str(x.device), x.dtype, "selective", layout.block)
            faster = "dense" if _share(layout) > limit else faster
        return TRACED[_traced_choice(layout.kind, x.is_cuda, faster, backend)]
    if not blocks:
        return _decide(layout.kind, x.is_cuda, backend)
    tokens_log2 = (x.numel() // (layout.shape[1] or 1) or 1).bit_length() - 1
    return _decide_blocks(_share(layout), layout.block, x.device, x.dtype, tokens_log2, backend)


def _share(layout: Layout) -> float:
    """Kept share of the rows and columns that have a kept block: one GEMM takes all of these."""
    rows = layout.shape[0] if layout.rows is None else layout.rows.shape[0]
    columns = layout.shape[1] if layout.columns is None else layout.columns.shape[0]
    return layout.kept_entries / (rows * columns)


@remembered
def _decide(kind: str, cuda: bool, backend: str) -> Choice:
    reason = _ELEMENTS if kind == "elements" else "one GEMM on the kept rows and columns"
    return _chosen(kind, cuda, "selective", backend, reason)


@remembered
def _decide_blocks(
    share: float,
    block: int,
    device: torch.device,
    dtype: torch.dtype,
    tokens_log2: int,
    backend: str,
) -> Choice:
    limit, source = break_even(device, dtype, "selective", block, tokens_log2)
    faster = "dense" if share > limit else "selective"
    return _chosen("blocks", device.type == "cuda", faster, backend, compare(share, limit, source))


@constant_when_traced
def _traced_choice(kind: str, cuda: bool, faster: str, backend: str) -> tuple[str, str]:
    chosen = _chosen(kind, cuda, faster, backend, "")
    return chosen.form, chosen.backend


def _chosen(kind: str, cuda: bool, faster: str, backend: str, reason: str) -> Choice:
    asked = environment.backend() if backend == "auto" else backend
    if asked == "auto" and (faster == "dense" or kind == "elements"):
        return Choice(form="dense", backend="torch", reason=reason)
    elements = _ELEMENTS if kind == "elements" else None
    on_a_gpu = cuda and kind == "blocks"
    here = cuda or environment.interpreting()
    refusals = {
        "triton": elements or (None if here else "x is not on a GPU"),
        "native": elements or ("triton serves blocks on a GPU" if on_a_gpu else None),
        "reference": None,
    }
    prefer = ("triton" if on_a_gpu else "native",)
    found = choose(refusals, backend, prefer=prefer, reason=reason)
    if found.backend == "native" and kind != "blocks":
        return replace(found, form="compact", backend="torch")
    return replace(found, form="dense" if found.backend == "reference" else "selective")


_ELEMENTS = "single elements take a dense gradient, of which the kept entries stay"


def explain(
    layout: Layout,
    *,
    tokens: int = 1024,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Choice:
    """The form of the gradient for ``tokens`` rows of ``dtype`` on ``device``, and why."""
    x = torch.empty(1, dtype=dtype, device=device).expand(tokens, layout.shape[1])
    return choice(layout, x, backend)
