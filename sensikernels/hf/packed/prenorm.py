"""One layer on packed tokens whose norms come first, with rotated positions and a gated FFN."""

from __future__ import annotations

from torch import Tensor

from sensikernels.hf.family import GatedBlock
from sensikernels.hf.packed.pieces import attend, is_exact_gelu
from sensikernels.hf.packed.tokens import Tokens
from sensikernels.ops.geglu import geglu
from sensikernels.ops.rotary import rotary


def run_gated(
    block: GatedBlock, hidden: Tensor, tokens: Tokens, *, fused: bool, first_only: bool
) -> Tensor:
    """One layer on ``[tokens, hidden]``: the same shape, or ``[rows, hidden]`` with ``first_only``.

    ``first_only``: queries, output projection and FFN for each sequence's first token alone; the
    one linear of query, key and value runs on every token.
    """
    context = _context(block, block.norm(hidden), tokens, first_only=first_only)
    residual = hidden.index_select(0, tokens.first) if first_only else hidden
    hidden = residual + block.dropout(block.attended(context))
    both = block.intermediate(block.ffn_norm(hidden))
    if fused and is_exact_gelu(block.activation):
        inner = geglu(both)
    else:
        first, gate = both.chunk(2, -1)
        inner = block.activation(first) * gate
    out: Tensor = hidden + block.output(block.inner_dropout(inner))
    return out


def _context(block: GatedBlock, x: Tensor, tokens: Tokens, *, first_only: bool) -> Tensor:
    """Attention's ``[asking rows, heads · head size]`` for ``x [tokens, hidden]``."""
    projected = block.projection(x).unflatten(-1, (-1, block.head_size))
    heads = projected.shape[1] // 3
    cos, sin = tokens.rotations[block.rotation]
    if first_only:
        query, key, value = projected.split(heads, 1)
        first = tokens.first
        query = rotary(query.index_select(0, first), cos[first], sin[first])
        key = rotary(key, cos, sin)
    else:
        both, value = projected.split((2 * heads, heads), 1)
        query, key = rotary(both, cos, sin).split(heads, 1)
    return attend(
        query,
        key,
        value,
        tokens,
        first_only=first_only,
        dropout=block.rate,
        scale=block.scale,
        window=block.window,
    )
