"""What layers of both kinds do alike on packed tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from sensikernels._core.errors import UsageError
from sensikernels._core.hooks import bare, hooked
from sensikernels.hf.packed.tokens import Tokens
from sensikernels.ops.varlen_attention import varlen_attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    *,
    first_only: bool,
    dropout: float,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """``[asking rows, heads · value size]`` of operands ``[rows, heads, size]``.

    ``first_only``: queries are ``[sequences, heads, size]``, of first tokens alone. ``window``:
    how far away a key is seen; None for any distance.
    """
    one_each = None
    if first_only:
        one_each = torch.arange(len(tokens.cu_seqlens), dtype=torch.int32, device=query.device)
    context = varlen_attention(
        query,
        key,
        value,
        tokens.cu_seqlens,
        max_length=tokens.max_length,
        cu_seqlens_query=one_each,
        max_length_query=1 if first_only else None,
        dropout=dropout,
        scale=scale,
        window=window,
    )
    return context.flatten(1)


def uncalled(module: Any) -> Any:
    """``module``, whose own forward is not called. Raises UsageError if it has hooks."""
    if not torch.compiler.is_compiling() and hooked(module):
        raise UsageError(
            f"{type(module).__name__}: expected no hooks on a module that packed tokens do not "
            "call, got hooks"
        )
    return module


def is_exact_gelu(act: Any) -> bool:
    """Whether calling ``act`` is the exact GELU, never the tanh form, and nothing else."""
    if bare(act, nn.GELU):
        return bool(act.approximate == "none")
    return (act.act if bare(act, GELUActivation) else act) is F.gelu
