"""Choice of the form in which a masked linear runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.compile import constant_when_traced
from sensikernels.layouts import Layout, to_device
from sensikernels.ops.common.choice import Choice, choose
from sensikernels.ops.common.columns import fused_activation
from sensikernels.ops.common.dispatch import TRACED, break_even, compare, remembered, traced_limit


def choice(layout: Layout, x: Tensor, backend: str = "auto") -> Choice:
    """The form that serves ``x``, on the layout's device, and why; ``auto`` takes the fastest.

    Raises:
        UsageError: a named backend cannot serve this layout or device.
    """
    kind = layout.kind
    if kind == "rows" and not (x.is_cuda and fused_activation(x)):
        kind = "compact"
    if torch.compiler.is_compiling():
        return TRACED[_traced(kind, layout, x, backend)]
    tokens = x.numel() // (layout.in_width or 1)
    device = layout.device or x.device
    return _decide(
        kind, layout.block, layout.density, device, x.dtype, tokens.bit_length(), backend
    )


@remembered
def _decide(
    kind: str,
    block: int,
    density: float,
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    backend: str,
) -> Choice:
    if kind in _REASONS:
        return _chosen(kind, device.type == "cuda", _FORMS[kind], backend, _REASONS[kind])
    limit, source = break_even(device, dtype, _FORMS[kind], block, max(bits - 1, 0))
    faster = "dense" if density > limit else _FORMS[kind]
    return _chosen(kind, device.type == "cuda", faster, backend, compare(density, limit, source))


def _traced(kind: str, layout: Layout, x: Tensor, backend: str) -> tuple[str, str]:
    """Form and backend for a graph, which must not depend on the token count."""
    faster = _FORMS[kind]
    if kind not in _REASONS:
        limit = traced_limit(str(x.device), x.dtype, faster, layout.block)
        faster = "dense" if layout.density > limit else faster
    return _traced_choice(kind, x.is_cuda, faster, backend)


@constant_when_traced
def _traced_choice(kind: str, cuda: bool, faster: str, backend: str) -> tuple[str, str]:
    chosen = _chosen(kind, cuda, faster, backend, "")
    return chosen.form, chosen.backend


def _chosen(kind: str, cuda: bool, faster: str, backend: str, reason: str) -> Choice:
    elements = _REASONS[kind] if kind == "elements" else None
    on_a_gpu = cuda and kind == "blocks"
    here = cuda or environment.interpreting()
    refusals = {
        "triton": elements or (None if here else "x is not on a GPU"),
        "native": elements or ("triton serves blocks on a GPU" if on_a_gpu else None),
        "reference": None,
    }
    # Scattering in the GEMM's epilogue spares a pass over y; chosen columns are saved, so gathered.
    auto = "triton" if on_a_gpu or kind == "rows" else "native"
    prefer = ("reference" if faster == "dense" else auto,)
    found = choose(refusals, backend, prefer=prefer, reason=reason)
    if found.backend == "reference":
        return replace(found, form="dense", backend="torch")
    torch_runs_it = found.backend == "native" and kind != "blocks"
    return replace(found, form=_FORMS[kind], backend="torch" if torch_runs_it else found.backend)


_FORMS = {
    "direct": "compact",
    "rows": "compact",
    "compact": "compact",
    "blocks": "block-sparse",
    "elements": "dense",
}
_REASONS = {
    "direct": "nothing to gather or scatter",
    "elements": "single elements run dense on the full weight",
}


def explain(
    layout: Layout,
    *,
    tokens: int = 1024,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Choice:
    """The form that ``masked_linear`` runs for ``tokens`` rows of ``dtype``, and why."""
    x = torch.empty(1, dtype=dtype, device=device).expand(tokens, layout.in_width)
    return choice(layout if layout.device == x.device else to_device(layout, device), x, backend)
